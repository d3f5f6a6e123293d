"""All operators of the engine's table, alone and in fused patterns, on every instruction set of this CPU.

Expected values come from ONNX: its backend node tests, and its reference evaluator for further shapes.
"""

from __future__ import annotations

import pickle
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from axrun.errors import BadInput
from axrun.format.axmodel import OPSET, PRODUCER, Axmodel, Node, TensorInfo, encode
from tests.engine import operator_cases, run_operators
from tests.engine.conftest import ROOT, Run
from tests.engine.operator_models import METADATA, PATTERNS, Sample, initializer, sample
from tests.engine.test_numerics import HERE

FUSED = ("linear", "attention", "rotary", "gated", "norm", "cast")


@pytest.fixture(scope="session")
def operators(ax: Any) -> list[str]:
    """The operators in the engine's table."""
    return [name for name in ax.library().counters() if name not in FUSED]


@pytest.fixture(scope="session")
def samples(operators: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with all samples."""
    made = [sample(op, case) for op in operators for case in operator_cases.cases(op)]
    made += [one for pattern in PATTERNS.values() for one in pattern()]
    path = tmp_path_factory.mktemp("operators") / "samples"
    path.write_bytes(pickle.dumps(made))
    return path


def test_every_operator_and_every_pattern_has_cases(operators: list[str], samples: Path) -> None:
    counts = Counter(one.op for one in pickle.loads(samples.read_bytes()))
    assert sorted(counts) == sorted({*operators, *FUSED, "plain"})
    assert len(operators) > 50


def test_skipped_node_tests_are_few_and_have_a_reason(operators: list[str]) -> None:
    kept, reasons = 0, Counter[str]()
    for op in operators:
        cases, out = operator_cases.node_tests(op)
        kept += len(cases)
        reasons.update(out.values())
    assert kept > 450
    assert set(reasons) <= {
        "a type the format does not have",
        "a cast to a type of weights",
        "of a later opset",
        "mixed types",
    }


@pytest.mark.parametrize("isa", HERE)
def test_every_operator_matches_onnx(isa: str, samples: Path, in_process: Run) -> None:
    done = in_process("run_operators.py", samples, AXC_ISA=isa)
    assert done.returncode == 0, done.stderr[-2000:]
    first, *lines = done.stdout.splitlines()
    assert first == isa
    assert not lines, "\n".join(lines[:20])


def model(
    op: str, given: dict[str, Any], stored: dict[str, Any], shape: tuple[int, ...], dtype: str, **attributes: Any
) -> bytes:
    infos = tuple(TensorInfo(name, operator_cases.dtype_of(x), x.shape) for name, x in given.items())
    node = Node(op, (*given, *stored), ("y",), attributes)
    tensors = {name: initializer(name, x) for name, x in stored.items()}
    return encode(
        Axmodel(PRODUCER, "test", OPSET, METADATA, infos, (TensorInfo("y", dtype, shape),), (node,), tensors, "case")
    )


X = np.arange(12, dtype=np.float32).reshape(3, 4)
TABLE = np.ones((2, 2), np.float32)
WRONG: dict[str, tuple[str, dict[str, Any], dict[str, Any], tuple[int, ...], str, dict[str, Any], str]] = {
    "gather": (
        "Gather", {"x": X, "i": np.array([0, 3])}, {}, (2, 4), "FLOAT", {"axis": 0},
        "index 3 is outside the 3 of x",
    ),
    "gather before": ("Gather", {"x": X, "i": np.array([-4])}, {}, (1, 4), "FLOAT", {}, "index -4 is outside the 3"),
    "division": (
        "Div", {"x": np.array([1, 2]), "y0": np.array([1, 0])}, {}, (2,), "INT64", {}, "an integer is divided by zero",
    ),
    "remainder": (
        "Mod", {"x": np.array([1, 2], np.uint32)}, {"by": np.array([0], np.uint32)}, (2,), "UINT32", {},
        "an integer is divided by zero",
    ),
    "position": (
        "RotaryEmbedding",
        {"x": X.reshape(1, 3, 4), "c": TABLE, "s": TABLE, "p": np.array([[0, 1, 2]])},
        {}, (1, 3, 4), "FLOAT", {"num_heads": 1}, "position 2 is outside the 2 of the rotary tables",
    ),
    "reshape": ("Reshape", {"x": X}, {"to": np.array([5, -1])}, (5, 2), "FLOAT", {}, "does not divide into"),
    "huge": (
        "Expand", {"x": np.ones(1, np.float32)}, {"to": np.array([1 << 30, 1 << 30])}, (1, 1), "FLOAT", {}, "too large",
    ),
    "unknown shape": ("Reshape", {"x": X, "to": np.array([12])}, {}, (12,), "FLOAT", {}, "is not known when the model"),
    "broadcast": ("Add", {"x": X, "z": np.ones(3, np.float32)}, {}, (3, 4), "FLOAT", {}, "shapes"),
    "axis": ("Softmax", {"x": X}, {}, (3, 4), "FLOAT", {"axis": 2}, "axis 2 of rank 2"),
    "perm": ("Transpose", {"x": X}, {}, (4, 3), "FLOAT", {"perm": (0, 0)}, "perm"),
    "top k": ("TopK", {"x": X}, {"k": np.array([9])}, (3, 9), "FLOAT", {}, "k 9 of 4"),
    "step": (
        "Slice", {"x": X}, {"a": np.array([0]), "b": np.array([2]), "c": np.array([0]), "d": np.array([0])},
        (2, 4), "FLOAT", {}, "steps or axes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_unsupported_operators_are_refused(name: str, ax: Any, tmp_path: Path) -> None:
    op, given, stored, shape, dtype, attributes, words = WRONG[name]
    data = model(op, given, stored, shape, dtype, **attributes)
    answer = (np.zeros(shape, helper.tensor_dtype_to_np_dtype(1) if dtype == "FLOAT" else np.int64),)
    one = Sample(op, name, data, tuple(x.tobytes() for x in given.values()), answer, 0, 0)
    with pytest.raises(BadInput, match=re.escape(words)):
        run_operators.run(one, tmp_path / "case.axmodel")


def test_the_documentation_lists_every_operator(operators: list[str]) -> None:
    text = (ROOT / "docs" / "axmodel.md").read_text()
    listed = re.search(r"## Operators\n(.*?)\n## ", text, re.S)
    assert listed
    assert sorted(re.findall(r"^\| `(\w+)` \|", listed[1], re.M)) == sorted(operators)

"""The engine's results compared with onnxruntime on the same file."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from axrun.errors import BadInput
from axrun.format.axmodel import OPSET, PRODUCER, Axmodel, Node, Tensor, TensorInfo, encode
from axrun.format.bundle import Bundle
from axrun.format.dtypes import DTYPES, FLOATS, from_float32, nbytes, to_float32
from axrun.format.quantised import pack4
from axrun.model import Model
from axrun.session import ax_int8
from tests.engine.compare import exact, filled
from tests.engine.conftest import Run

TOLERANCE = {"fp32": 1e-4, "fp16": 2e-3, "bf16": 2e-2}
ISAS = {
    "x86_64": ["portable", "avx2", "avx512", "avx512_bf16", "avx512_pairs"],
    "aarch64": ["portable", "neon", "neon_dotprod"],
}[platform.machine()]
WEIGHTS = ("fp32", "fp16", "bf16", "s8", "s4", "fp8_e4m3", "fp8_e5m2")


CPU = Path("/proc/cpuinfo").read_text()
NEEDED = {
    "avx512": ["avx512_vnni"],
    "avx512_bf16": ["avx512_vnni", "avx512_bf16"],
    "avx512_pairs": ["avx512_vnni", "avx512_bf16", "AuthenticAMD"],
}
HERE = [isa for isa in ISAS if all(name in CPU for name in NEEDED.get(isa, ()))]


@pytest.fixture(scope="session")
def axmodels(build_tiny: Callable[..., Path]) -> list[Path]:
    """A layer and a post model of every hidden and weight type."""
    paths = []
    for hidden, weights in (("fp32", WEIGHTS), ("bf16", WEIGHTS), ("fp16", ("s8",))):
        for weight in weights:
            options = {"post_topk": 5} if weight == "fp32" else {}
            post = weight if weight != "s4" else "s8"
            made = build_tiny(hidden_state_type=hidden, weight_type=weight, post_weight_type=post, **options)
            bundle = Bundle.open(made)
            paths += [bundle.layer_path(1), bundle.post_path]
    return paths


@pytest.mark.parametrize("isa", HERE)
def test_every_group_of_every_type_matches_onnxruntime(isa: str, axmodels: list[Path], in_process: Run) -> None:
    done = in_process("compare.py", *axmodels, AXC_ISA=isa)
    assert done.returncode == 0, done.stderr[-2000:]
    first, *lines = done.stdout.splitlines()
    assert first == isa
    assert len(lines) == len(axmodels)
    for line in lines:
        path, hidden, worst = line.split()
        assert float(worst) <= TOLERANCE[hidden], (path, worst)


def linear_file(
    folder: Path,
    parts: list[tuple[str, tuple[int, ...], Any]],
    attributes: dict[str, int],
    hidden: str = "fp32",
    tokens: tuple[int, ...] = (1, 3, 41),
) -> Path:
    """An axmodel with one linear layer; `hidden`: type of input and output, `parts`: tensors of its weight, `tokens`:
    rows of its groups.
    """
    state = FLOATS[hidden]
    tensors = {
        f"weight.{i}": Tensor(f"weight.{i}", dtype, dims, -1, nbytes(dtype, dims), memoryview(data.tobytes()))
        for i, (dtype, dims, data) in enumerate(parts)
    }
    rows, columns = parts[0][1]
    widened = [Node("Cast", ("weight.0",), ("wide",), {"to": 1})]
    if len(parts) > 1:
        names = list(tensors)
        widened = []
        if parts[1][0] == "FLOAT16":
            widened.append(Node("Cast", (names[1],), ("scales",), {"to": 1}))
            names[1] = "scales"
        widened.append(Node("DequantizeLinear", tuple(names), ("wide",), attributes))
    nodes = (
        *widened,
        Node("Transpose", ("wide",), ("transposed",), {"perm": (1, 0)}),
        Node("Cast", ("input",), ("x",), {"to": DTYPES["FLOAT"].onnx}),
        Node("MatMul", ("x", "transposed"), ("product",)),
        Node("Cast", ("product",), ("output",), {"to": DTYPES[state].onnx}),
    )
    metadata = {
        "axmodel.version": "1",
        "axmodel.kind": "post",
        "axmodel.groups": json.dumps([{"tokens": count, "history": 0} for count in tokens], separators=(",", ":")),
        "axmodel.hidden_state_type": hidden,
    }
    model = Axmodel(
        producer_name=PRODUCER,
        producer_version="test",
        opset=OPSET,
        metadata=metadata,
        inputs=(TensorInfo("input", state, (1, "M", columns)),),
        outputs=(TensorInfo("output", state, (1, "M", rows)),),
        nodes=nodes,
        initializers=tensors,
        name="linear",
    )
    kind = "-".join([hidden, *(part[0] for part in parts)])
    path = folder / f"{kind}-{rows}x{columns}-{attributes.get('block_size', 0)}.axmodel"
    path.write_bytes(encode(model))
    return path


def levels(
    random: Any, dtype: str, rows: int, columns: int, block: int, scale_dtype: str = "FLOAT", zeros: bool = False
) -> list[tuple[str, tuple[int, ...], Any]]:
    """Random levels including the extremes of the type, with scales of both signs."""
    scales = random.standard_normal((rows, columns // block) if block else rows).astype(np.float32)
    if dtype == "INT8":
        data = random.choice(np.array([-128, -127, 127, -1, 0, 5, 90], np.int8), (rows, columns))
        data[0, 0] = 127
        data[-1] = -128
    else:
        data = random.integers(0, 256, rows * columns // 2, np.uint8)
    parts = [(dtype, (rows, columns), data), (scale_dtype, scales.shape, from_float32(scales, scale_dtype))]
    if zeros:
        least, most = {"INT8": (-128, 127), "INT4": (-8, 7)}[dtype]
        points = random.integers(least, most, scales.shape, np.int8, endpoint=True)
        points.flat[0] = least
        parts.append((dtype, scales.shape, pack4(points) if dtype == "INT4" else points))
    return parts


@pytest.mark.parametrize("isa", HERE)
def test_odd_shapes_and_blocks(isa: str, tmp_path: Path, in_process: Run) -> None:
    """Rows and columns that do not fill a vector, blocks other than 128, all float types."""
    random = np.random.default_rng(0)
    paths = []
    for rows, columns in ((1, 1), (37, 130), (33, 576), (5, 127), (70, 2240)):
        paths.append(linear_file(tmp_path, levels(random, "INT8", rows, columns, 0), {"axis": 0}))
    for rows, columns, block in ((1, 128, 128), (37, 384, 128), (19, 192, 64), (3, 48, 16), (9, 6, 2), (65, 2304, 128)):
        paths.append(
            linear_file(tmp_path, levels(random, "INT4", rows, columns, block), {"axis": 1, "block_size": block})
        )
    for rows, columns, block in ((4, 9, 9), (4, 6, 3), (4, 6, 1)):  # blocks that begin inside a byte: not fused
        paths.append(
            linear_file(tmp_path, levels(random, "INT4", rows, columns, block), {"axis": 1, "block_size": block})
        )
    for scale_dtype, zeros in (
        ("FLOAT", True),
        ("FLOAT16", True),
        ("FLOAT16", False),
    ):  # blocks too small for integer arithmetic
        for dtype, rows, columns, block in (("INT4", 5, 36, 12), ("INT4", 5, 96, 16), ("INT8", 5, 63, 9)):
            parts = levels(random, dtype, rows, columns, block, scale_dtype, zeros)
            paths.append(linear_file(tmp_path, parts, {"axis": 1, "block_size": block}))
    for dtype, nan in (("FLOAT8E4M3FN", (0x7F, 0xFF)), ("FLOAT8E5M2", (*range(0x7C, 0x80), *range(0xFC, 0x100)))):
        every = np.array([byte for byte in range(256) if byte not in nan], np.uint8)
        paths.append(linear_file(tmp_path, [(dtype, (31, 75), random.choice(every, (31, 75)))], {}))
    for hidden, weight in (("fp32", "fp32"), ("fp32", "fp16"), ("fp32", "bf16"), ("bf16", "bf16")):
        for rows, columns in ((1, 1), (37, 130), (33, 575), (5, 127), (70, 2240)):
            data = from_float32(random.standard_normal((rows, columns), np.float32), FLOATS[weight])
            paths.append(linear_file(tmp_path, [(FLOATS[weight], (rows, columns), data)], {}, hidden))
    done = in_process("compare.py", *paths, AXC_ISA=isa)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()[1:]
    assert len(lines) == len(paths)
    for line in lines:
        path, hidden, worst = line.split()
        assert float(worst) <= TOLERANCE[hidden], (path, worst)


# rows, columns and block of weights for integer arithmetic; block 0: one scale per row
INTEGER_SHAPES = (
    *((37, 384, 128), (6, 128, 128), (5, 640, 128)),
    *((37, 96, 32), (33, 576, 32), (3, 2304, 32), (66, 1152, 32)),
    *((9, 576, 64), (70, 1536, 64), (17, 64, 64)),
    *((3, 96, 96), (33, 192, 96), (8, 512, 256)),  # blocks with several of the kernels' groups
    *((7, 36, 0), (6, 130, 0), (8, 512, 0)),
)


def grouped(
    folder: Path,
    scale_dtype: str,
    zeros: bool,
    shapes: tuple[tuple[int, int, int], ...] = INTEGER_SHAPES,
    tokens: tuple[int, ...] = (1, 3, 41),
) -> list[Path]:
    """Weights of these shapes in INT8 and INT4."""
    random = np.random.default_rng(0)
    return [
        linear_file(
            folder,
            levels(random, dtype, rows, columns, block, scale_dtype, zeros),
            {"axis": 1, "block_size": block} if block else {"axis": 0},
            tokens=tokens,
        )
        for dtype in ("INT4", "INT8")
        for rows, columns, block in shapes
    ]


def kinds(folder: Path) -> list[Path]:
    """Weights of all shapes, level types and scale types, with and without zero points."""
    return [path for scale in ("FLOAT", "FLOAT16") for zeros in (False, True) for path in grouped(folder, scale, zeros)]


@pytest.mark.parametrize("isa", HERE)
def test_activations_are_rounded_to_the_requested_bits(isa: str, tmp_path: Path, in_process: Run) -> None:
    """Integer products are exact, so results match onnxruntime with rounded activations.

    Weights computed in float32 instead would differ by the rounding error.
    """
    random = np.random.default_rng(0)
    paths = [linear_file(tmp_path, levels(random, "INT8", *shape, 0), {"axis": 0}) for shape in ((37, 300), (5, 127))]
    paths += kinds(tmp_path)
    done = in_process("rounded.py", *paths, AXC_ISA=isa)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [bits for _, bits, _ in lines] == ["16", "8"] * len(paths)
    for path, bits, worst in lines:
        assert float(worst) < 1e-5, (path, bits, worst)


def test_fewer_bits_are_less_exact_and_only_used_on_request(ax: Any, bundle_s8: Path) -> None:
    path = Bundle.open(bundle_s8).layer_path(0)
    usual, plain = ax.open_session(path), exact(path)
    short = ax_int8.open_session(path)
    wanted = filled(usual, 2)
    arrays = {session: {name: array.copy() for name, array in wanted.items()} for session in (usual, short)}
    plain.bind(2, wanted).run()
    for session, bound in arrays.items():
        session.bind(2, bound).run()
    errors = {
        session: np.abs(to_float32(bound["output"], "BFLOAT16") - to_float32(wanted["output"], "BFLOAT16")).mean()
        for session, bound in arrays.items()
    }
    assert errors[usual] < errors[short] < 0.01 * np.abs(to_float32(wanted["output"], "BFLOAT16")).max()
    with pytest.raises(BadInput, match="12 bits for activations; expected 8 or 16"):
        usual.round_activations(12)


def test_a_model_generates_the_same_tokens_as_with_onnxruntime(bundle_s8: Path, tiny_qwen2: Path, ax: Any) -> None:
    bundle = Bundle.open(bundle_s8)
    tokenizer = Tokenizer.from_file(str(tiny_qwen2 / "tokenizer.json"))
    prompt = tokenizer.encode(tiny_qwen2.joinpath("heldout.txt").read_text()).ids[:70]
    ours, theirs = Model.load(bundle, engine="ax"), Model.load(bundle, engine="ort")
    tokens: list[list[int]] = []
    for model in (ours, theirs):
        token, said = prompt, []
        for _ in range(40):
            logits = model.forward(token)  # logits of the last token
            token = [int(logits.argmax())]
            said += token
        tokens.append(said)
    assert tokens[0] == tokens[1]
    assert len(set(tokens[0])) > 3


def run_with_threads(ax: Any, path: Path, group: int, threads: int) -> dict[str, Any]:
    session = ax.open_session(path, threads)
    arrays = filled(session, group)
    for _ in range(3):
        session.bind(group, arrays).run()
    return {info.name: arrays[info.name] for info in session.groups[group].outputs}


@pytest.mark.parametrize("weight", ["s8", "s4", "bf16"])
def test_results_do_not_depend_on_the_number_of_threads(ax: Any, build_tiny: Callable[..., Path], weight: str) -> None:
    bundle = Bundle.open(build_tiny(weight_type=weight))
    for path, groups in ((bundle.layer_path(0), range(4)), (bundle.post_path, range(1))):
        for group in groups:
            alone = run_with_threads(ax, path, group, 1)
            for threads in (2, 3, 7):
                for name, array in run_with_threads(ax, path, group, threads).items():
                    np.testing.assert_array_equal(array, alone[name])


def test_a_row_without_a_visible_column_is_a_plain_softmax(ax: Any, bundle_fp32: Path) -> None:
    path = Bundle.open(bundle_fp32).layer_path(0)
    ours, plain = ax.open_session(path), exact(path)
    seen = filled(ours, 2)
    seen["mask"][0, 3] = -65536
    wanted = {name: array.copy() for name, array in seen.items()}
    ours.bind(2, seen).run()
    plain.bind(2, wanted).run()
    # adding -65536 leaves a score with a precision of 2^-8: only here may the engines differ by as much
    np.testing.assert_allclose(seen["output"][0, 3], wanted["output"][0, 3], rtol=0, atol=0.05)
    np.testing.assert_allclose(
        np.delete(seen["output"][0], 3, 0), np.delete(wanted["output"][0], 3, 0), rtol=0, atol=1e-4
    )

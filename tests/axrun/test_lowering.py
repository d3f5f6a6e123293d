"""Lowered weights compute the same as the file, compared with numpy in float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from axrun.format import axmodel
from axrun.format.dtypes import from_float32, to_float32
from axrun.format.quantised import pack4
from axrun.session import ort
from axrun.session.lowering import lower

LinearFile = Callable[..., Path]
Weight = tuple[list[tuple[str, tuple[int, ...], NDArray[Any]]], dict[str, int], NDArray[np.float64]]

# For comparison: rounding activations to 8 bits gives an error of 1e-2, to bfloat16 2e-3, float32 sums 1e-6.
TWO_HALVES = 1e-4
FLOAT32 = 3e-6


def make(kind: str, rows: int, columns: int, block: int = 0, zeros: bool = False, scale_dtype: str = "FLOAT") -> Weight:
    """Parts of a random weight, the attributes of its DequantizeLinear, and its values."""
    random = np.random.default_rng(columns)
    if kind in ("FLOAT", "FLOAT16", "BFLOAT16"):
        stored = from_float32(random.standard_normal((rows, columns), np.float32), kind)
        return [(kind, (rows, columns), stored)], {}, to_float32(stored, kind).astype(np.float64)
    low, high = (-127, 127) if kind == "INT8" else (-8, 7)
    levels = random.integers(low, high, (rows, columns), endpoint=True)
    size = block or columns
    stored = from_float32(random.uniform(-1, 1, (rows, -(-columns // size))).astype(np.float32), scale_dtype)
    scales = to_float32(stored, scale_dtype)
    offsets = random.integers(low, high, scales.shape, endpoint=True) * zeros
    values = (levels - np.repeat(offsets, size, axis=1)[:, :columns]).astype(np.float64)
    values *= np.repeat(scales.astype(np.float64), size, axis=1)[:, :columns]

    def packed(integers: NDArray[Any]) -> NDArray[Any]:
        return integers.astype(np.int8) if kind == "INT8" else pack4(integers.astype(np.int8))

    shape, attributes = ((rows,), {"axis": 0}) if not block else (scales.shape, {"axis": 1, "block_size": size})
    parts = [(kind, levels.shape, packed(levels)), (scale_dtype, shape, stored)]
    return [*parts, (kind, shape, packed(offsets))] if zeros else parts, attributes, values


def run(path: Path, x: NDArray[np.float32], lowered: bool) -> NDArray[np.float32]:
    session = ort.open_session(path, threads=1, lowered=lowered)
    out = np.zeros((1, x.shape[1], int(session.groups[0].outputs[0].shape[2])), np.float32)
    session.bind(0, {"input": x, "output": out}).run()
    return out


def error(seen: NDArray[Any], expected: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.square(seen - expected).mean() / np.square(expected).mean()))


@pytest.mark.parametrize(
    ("kind", "columns", "block", "operator", "bound"),
    [
        ("FLOAT", 96, 0, "FusedMatMul", FLOAT32),
        ("FLOAT16", 96, 0, "FusedMatMul", FLOAT32),
        ("BFLOAT16", 96, 0, "FusedMatMul", FLOAT32),
        ("INT8", 256, 0, "MatMulNBits", TWO_HALVES),
        ("INT8", 80, 0, "MatMulNBits", TWO_HALVES),  # only a block of 16 divides
        ("INT8", 84, 0, "FusedMatMul", FLOAT32),  # no block divides
        ("INT4", 256, 128, "MatMulNBits", TWO_HALVES),
        ("INT4", 192, 64, "MatMulNBits", TWO_HALVES),
        ("INT4", 192, 96, "MatMulNBits", TWO_HALVES),  # a stored block spans several kernel blocks
        ("INT4", 56, 8, "FusedMatMul", FLOAT32),  # blocks too small for the kernel
        ("INT4", 96, 40, "FusedMatMul", FLOAT32),  # no kernel block divides these, and the last one is short
        ("INT4, zero points", 96, 32, "MatMulNBits", TWO_HALVES),  # rows of zero points that end inside a byte
        ("INT4, zero points", 192, 96, "MatMulNBits", TWO_HALVES),
        ("INT4, half scales", 96, 32, "MatMulNBits", TWO_HALVES),
        ("INT8, half scales, zero points", 96, 32, "MatMulNBits", TWO_HALVES),
        ("INT4, zero points", 56, 8, "FusedMatMul", FLOAT32),
        ("INT8, zero points", 96, 32, "MatMulNBits", TWO_HALVES),
        ("INT8, zero points", 84, 0, "FusedMatMul", FLOAT32),
    ],
)
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_lowered_weight_computes_the_same_as_the_file(
    linear_file: LinearFile, kind: str, columns: int, block: int, operator: str, bound: float, tokens: int
) -> None:
    parts, attributes, values = make(
        kind.split(",")[0], 48, columns, block, "zero" in kind, "FLOAT16" if "half" in kind else "FLOAT"
    )
    path = linear_file(parts, **attributes)
    before = path.read_bytes()
    x = np.random.default_rng(1).standard_normal((1, tokens, columns), np.float32)
    x *= np.exp(np.random.default_rng(2).standard_normal(columns)).astype(
        np.float32
    )  # uneven scales, like hidden states
    expected = x.astype(np.float64) @ values.T

    model, _ = lower(axmodel.read(path))
    operators = Counter(node.op_type for node in onnx.load_from_string(model).graph.node)
    assert operators[operator] == 1
    assert not operators.keys() & {"Cast", "DequantizeLinear", "Transpose", "MatMul"}
    assert error(run(path, x, lowered=True), expected) < bound
    assert path.read_bytes() == before


@pytest.mark.parametrize(("kind", "block"), [("INT8", 0), ("INT4", 128)])
def test_zeros_and_extreme_values_stay_exact(linear_file: LinearFile, kind: str, block: int) -> None:
    parts, attributes, values = make(kind, 48, 256, block)
    x = np.zeros((1, 4, 256), np.float32)
    x[0, 1, 3] = 1e30
    x[0, 2, :128] = 1e-30
    x[0, 3] = 65504 * np.sign(np.random.default_rng(3).standard_normal(256))
    seen = run(linear_file(parts, **attributes), x, lowered=True)
    assert not seen[0, 0].any()
    for row in (1, 2, 3):
        assert error(seen[0, row], x[0, row].astype(np.float64) @ values.T) < TWO_HALVES


def test_unknown_graphs_are_not_changed(linear_file: LinearFile) -> None:
    """An unsigned weight is not ours; onnxruntime takes it as it stands."""
    levels = np.random.default_rng(0).integers(0, 255, (48, 64)).astype(np.uint8)
    scales, zeros = np.full(48, 0.5, np.float32), np.full(48, 3, np.uint8)
    path = linear_file([("UINT8", (48, 64), levels), ("FLOAT", (48,), scales), ("UINT8", (48,), zeros)], axis=0)
    x = np.random.default_rng(1).standard_normal((1, 2, 64), np.float32)
    model, _ = lower(axmodel.read(path))
    assert "DequantizeLinear" in {node.op_type for node in onnx.load_from_string(model).graph.node}
    np.testing.assert_allclose(run(path, x, lowered=True), run(path, x, lowered=False), rtol=1e-6)

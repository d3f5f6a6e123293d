"""Quantisers against plain numpy written the slow way, and against what ONNX says its stored form means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.numpy_helper
import onnx.reference
import pytest

from axc.quantizer import WEIGHT_TYPES, SquaredError
from axc.quantizer.round_to_nearest import quantize

RANDOM = np.random.default_rng(0)
SHAPES: dict[str, Callable[[tuple[int, int]], Any]] = {
    "normal": RANDOM.standard_normal,
    "student": lambda size: RANDOM.standard_t(4, size),
    "zero": np.zeros,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "low", "high", "size"), [("INT8", -127, 127, 384), ("INT4", -8, 7, 128)])
def test_scales_are_chosen_by_error(shape: str, dtype: str, low: int, high: int, size: int) -> None:
    """Never worse than the scale of the largest magnitude, levels in range, and the error as stated."""
    groups = SHAPES[shape]((64, size)).astype(np.float32)
    levels, scales, noise, _ = quantize(groups.copy(), dtype)
    assert levels.min() >= low
    assert levels.max() <= high
    restored = levels * scales[:, None].astype(np.float64)
    errors = np.square(restored - groups).sum(axis=1)
    np.testing.assert_allclose(errors, noise, rtol=1e-3, atol=1e-12)
    largest = np.abs(groups).max(axis=1, keepdims=True) / high
    safe = np.where(largest == 0, 1, largest)
    plain = np.square(np.clip(np.rint(groups / safe), low, high) * safe - groups).sum(axis=1)
    assert errors.sum() <= plain.sum()
    if shape != "zero":
        assert errors.sum() < (0.996 if dtype == "INT8" else 0.8) * plain.sum()


@pytest.mark.parametrize("stored", ["BFLOAT16", "FLOAT16", "FLOAT"])
@pytest.mark.parametrize("weight_type", WEIGHT_TYPES)
def test_what_is_stored_comes_back_as_onnx_reads_it(weight_type: str, stored: str) -> None:
    """Parts -> TensorProtos -> onnx's reference evaluator of DequantizeLinear or Cast."""
    carriers = {"BFLOAT16": ml_dtypes.bfloat16, "FLOAT16": np.float16, "FLOAT": np.float32}
    weights = RANDOM.standard_normal((24, 256)).astype(carriers[stored])
    kind, error = WEIGHT_TYPES[weight_type], SquaredError()
    arrays = list(kind.store(weights.view(np.uint16) if stored == "BFLOAT16" else weights, stored, error))
    parts = kind.parts("w", 24, 256)
    tensors = [
        onnx.TensorProto(
            name=name, data_type=onnx.TensorProto.DataType.Value(dtype), dims=dims, raw_data=array.tobytes()
        )
        for (name, dtype, dims), array in zip(parts, arrays, strict=True)
    ]
    op = "DequantizeLinear" if len(parts) > 1 else "Cast"
    attributes: dict[str, Any] = kind.dequantize(256) if len(parts) > 1 else {"to": onnx.TensorProto.FLOAT}
    node = onnx.helper.make_node(op, [part[0] for part in parts], ["y"], **attributes)
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [24, 256])
    graph = onnx.helper.make_graph([node], "g", [], [output], tensors)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])
    evaluated: Any = onnx.reference.ReferenceEvaluator(model).run(None, {})
    restored = evaluated[0].astype(np.float64)
    wanted = weights.astype(np.float64)
    relative = np.sqrt(np.square(restored - wanted).sum() / np.square(wanted).sum())
    assert relative <= {"fp32": 0, "fp16": 1e-3, "bf16": 3e-3, "s8": 0.01, "s4": 0.12}[weight_type]
    if len(parts) > 1:
        assert error.relative == pytest.approx(relative, rel=1e-3)


def test_s4_blocks_shrink_until_they_divide_the_row() -> None:
    assert [WEIGHT_TYPES["s4"].dequantize(width)["block_size"] for width in (896, 4864, 320, 48)] == [128, 128, 64, 16]


def test_rounding_to_bfloat16_is_that_of_ml_dtypes() -> None:
    from axrun.format.dtypes import bf16_to_f32, f32_to_bf16

    bits = RANDOM.integers(0, 1 << 32, 200_000, np.uint32)
    values = np.concatenate([bits, np.array([0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x00008000, 0x00018000], np.uint32)])
    floats = values.view(np.float32)
    finite = ~np.isnan(floats)
    with np.errstate(invalid="ignore"):
        expected = floats.astype(ml_dtypes.bfloat16).view(np.uint16)
    assert (f32_to_bf16(floats)[finite] == expected[finite]).all()
    assert np.isnan(bf16_to_f32(f32_to_bf16(floats))[~finite]).all()


def test_no_scale_underflows(tmp_path: Path) -> None:
    """Rows of denormals and of the largest floats: finite scales, finite products."""
    groups = np.array([[1e-44] * 128, [3e38] * 128, [0.0] * 128], np.float32)
    for dtype in ("INT8", "INT4"):
        levels, scales, *_ = quantize(groups.copy(), dtype)
        assert np.isfinite(scales).all()
        assert np.abs(levels[1] * scales[1] / 3e38 - 1).max() < 0.07

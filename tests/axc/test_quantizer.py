"""Quantisers compared with simple numpy code, and with ONNX's reference evaluator on the stored form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.numpy_helper
import onnx.reference
import onnxruntime
import pytest

from axc.axmodel.writer import write_axmodel
from axc.doctor.stored import read as stored_weights
from axc.graph import Graph, Weight
from axc.quantizer import WEIGHT_TYPES, SquaredError, WeightType
from axc.quantizer.kept import Kept
from axc.quantizer.round_to_nearest import RoundToNearest, quantize
from axc.weights.sources import Stored
from axrun.errors import BadInput
from axrun.format import axmodel, dtypes
from axrun.format.axmodel import PRODUCER
from axrun.session import ax_engine, ort

RANDOM = np.random.default_rng(0)
SHAPES: dict[str, Callable[[tuple[int, int]], Any]] = {
    "normal": RANDOM.standard_normal,
    "student": lambda size: RANDOM.standard_t(4, size),
    "zero": np.zeros,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "low", "high", "size"), [("INT8", -127, 127, 384), ("INT4", -8, 7, 128)])
def test_scales_are_chosen_by_error(shape: str, dtype: str, low: int, high: int, size: int) -> None:
    """Never worse than absmax scaling; quantised values are in range, and the reported error is right."""
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


HALF_SCALES = {
    f"{name} in {size}, half scales": RoundToNearest(dtype, size, "FLOAT16")
    for name, dtype in (("s8", "INT8"), ("s4", "INT4"))
    for size in (32, 64)
}
KINDS: dict[str, WeightType] = {**WEIGHT_TYPES, **HALF_SCALES}
MOST = {"fp32": 0, "fp16": 1e-3, "bf16": 3e-3, "s8": 0.01, "s4": 0.12, "fp8_e4m3": 0.028, "fp8_e5m2": 0.055}
FLOAT8 = {"FLOAT8E4M3FN": ml_dtypes.float8_e4m3fn, "FLOAT8E5M2": ml_dtypes.float8_e5m2}


@pytest.mark.parametrize("stored", ["BFLOAT16", "FLOAT16", "FLOAT"])
@pytest.mark.parametrize("weight_type", KINDS)
def test_stored_values_dequantise_by_onnx_rules(weight_type: str, stored: str) -> None:
    """Parts -> TensorProtos -> onnx's reference evaluator of DequantizeLinear or Cast."""
    carriers = {"BFLOAT16": ml_dtypes.bfloat16, "FLOAT16": np.float16, "FLOAT": np.float32}
    weights = RANDOM.standard_normal((24, 256)).astype(carriers[stored])
    kind, error = KINDS[weight_type], SquaredError()
    arrays = list(kind.store(weights.view(np.uint16) if stored == "BFLOAT16" else weights, stored, error))
    parts = kind.parts("w", 24, 256)
    tensors = [
        onnx.TensorProto(
            name=name, data_type=onnx.TensorProto.DataType.Value(dtype), dims=dims, raw_data=array.tobytes()
        )
        for (name, dtype, dims), array in zip(parts, arrays, strict=True)
    ]
    cast: dict[str, Any] = {"to": onnx.TensorProto.FLOAT}
    nodes = [onnx.helper.make_node("Cast", [parts[-1][0]], ["wide" if len(parts) > 1 else "y"], **cast)]
    if len(parts) > 1:
        attributes: dict[str, Any] = kind.dequantize(256)
        nodes.append(onnx.helper.make_node("DequantizeLinear", ["w", "wide"], ["y"], **attributes))
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [24, 256])
    graph = onnx.helper.make_graph(nodes, "g", [], [output], tensors)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])
    evaluated: Any = onnx.reference.ReferenceEvaluator(model).run(None, {})
    restored = evaluated[0].astype(np.float64)
    wanted = weights.astype(np.float64)
    relative = np.sqrt(np.square(restored - wanted).sum() / np.square(wanted).sum())
    assert relative <= MOST[weight_type.split()[0]]
    if len(parts) > 1:
        assert error.relative == pytest.approx(relative, rel=1e-3)


class Packed:
    """A matrix that a checkpoint stores as quantised values, scales and zero points; read row by row."""

    def __init__(self, dtype: str, rows: int, columns: int, block: int, zeros: bool) -> None:
        low, high = {"INT8": (-128, 127), "INT4": (-8, 7)}[dtype]
        self.levels_ = RANDOM.integers(low, high, (rows, columns), np.int8, endpoint=True)
        self.scales = RANDOM.normal(0, 0.1, (rows, columns // block)).astype(np.float16).astype(np.float32)
        self.zeros = RANDOM.integers(low, high, self.scales.shape, np.int8, endpoint=True) if zeros else None

    def levels(self, name: str, start: int, stop: int) -> Any:
        for row in range(start, stop):
            arrays = (self.levels_, self.scales) if self.zeros is None else (self.levels_, self.scales, self.zeros)
            yield tuple(array[row : row + 1] for array in arrays)

    @property
    def values(self) -> Any:
        block = self.levels_.shape[1] // self.scales.shape[1]
        zeros = 0 if self.zeros is None else np.repeat(self.zeros, block, axis=1)
        return (self.levels_.astype(np.float32) - zeros) * np.repeat(self.scales, block, axis=1)


def write_linear(path: Path, tensors: Any, kind: Kept, rows: int, columns: int) -> None:
    """An axmodel with this single matrix, as written by the compiler."""
    graph = Graph("linear", kind, "FLOAT", {"w.weight": Stored("w.weight", (rows, columns))}, {"w.weight": kind})
    graph.output("output", graph.linear(graph.input("input", "FLOAT", 1, "M", columns), "w"), "FLOAT")
    groups = '[{"tokens":1,"history":0},{"tokens":7,"history":0}]'
    metadata = {"axmodel.version": "1", "axmodel.kind": "post", "axmodel.groups": groups}
    model = graph.axmodel("test", 23, PRODUCER, {**metadata, "axmodel.hidden_state_type": "fp32"})
    assert all(not isinstance(data, Weight) or data.weight_type is kind for data in graph.parameters.values())
    write_axmodel(path, model, graph.parameters, tensors)


@pytest.mark.parametrize("scale_dtype", ["FLOAT", "FLOAT16"])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("dtype", "block"), [("INT4", 32), ("INT4", 64), ("INT8", 32)])
def test_kept_values_run_in_every_session(
    tmp_path: Path, dtype: str, block: int, zeros: bool, scale_dtype: str
) -> None:
    """Zero points whose rows end inside a byte; onnx's checker and evaluator, onnxruntime and our two sessions."""
    rows, columns = 5, 3 * block
    tensors = Packed(dtype, rows, columns, block, zeros)
    kind, path = Kept(dtype, block, "w.weight", "test", scale_dtype, zeros), tmp_path / "w.axmodel"
    write_linear(path, tensors, kind, rows, columns)
    onnx.checker.check_model(path, full_check=True)
    seen = stored_weights(axmodel.read(path))
    assert list(seen) == ["w.weight"]
    assert np.array_equal(seen["w.weight"].values(), tensors.values)
    x = np.eye(columns, dtype=np.float32)[None]  # the product is the matrix
    readers: tuple[Any, ...] = onnx.reference.ReferenceEvaluator(str(path)), onnxruntime.InferenceSession(path)
    for reader in readers:
        assert np.array_equal(reader.run(None, {"input": x})[0][0].T, tensors.values)
    stored = sum(tensor.nbytes for tensor in axmodel.read(path).initializers.values())
    assert abs(stored * 8 - kind.bits * rows * columns) < 8
    x = RANDOM.standard_normal((1, 7, columns), np.float32)
    expected = x[0] @ tensors.values.T
    for session in (ax_engine.open_session(path, 1), ort.open_session(path, threads=1)):
        out = np.zeros((1, 7, rows), np.float32)
        session.bind(1, {"input": x, "output": out}).run()
        assert np.abs(out[0] - expected).max() < 1e-4 * np.abs(expected).max()


def test_scales_out_of_range_of_their_type_are_refused(tmp_path: Path) -> None:
    tensors = Packed("INT4", 2, 64, 32, False)
    tensors.scales[1, 1] = 1.0001
    with pytest.raises(BadInput, match=r"w.weight holds scale 1\.0001, which FLOAT16 does not hold exactly"):
        write_linear(tmp_path / "w.axmodel", tensors, Kept("INT4", 32, "w.weight", "test", "FLOAT16"), 2, 64)
    with pytest.raises(OverflowError, match=r"a scale of 3.*, too large for FLOAT16"):
        quantize(np.full((1, 32), 3e37, np.float32), "INT4", "FLOAT16")


def test_float16_scales_cost_almost_no_accuracy() -> None:
    """Values are quantised with the scale as stored; the smallest scale does not become 0."""
    groups = RANDOM.standard_normal((512, 32)).astype(np.float32)
    groups[0] *= 1e-9
    errors = {}
    for scale_dtype in ("FLOAT", "FLOAT16"):
        levels, scales, noise, _ = quantize(groups.copy(), "INT8", scale_dtype)
        exact = np.square(levels * scales[:, None].astype(np.float64) - groups).sum(axis=1)
        np.testing.assert_allclose(exact, noise, rtol=1e-2, atol=1e-12)
        assert scales.all()
        assert np.abs(levels).max() <= 127
        errors[scale_dtype] = exact.sum()
    assert (scales.astype(np.float16) == scales).all()
    assert errors["FLOAT16"] < 1.01 * errors["FLOAT"]


def test_s4_blocks_shrink_until_they_divide_the_row() -> None:
    assert [WEIGHT_TYPES["s4"].dequantize(width)["block_size"] for width in (896, 4864, 320, 48)] == [128, 128, 64, 16]


@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_matches_ml_dtypes(dtype: str) -> None:
    """Every byte value, and the values at, next to and between the rounding ties."""
    theirs = np.arange(256, dtype=np.uint8).view(FLOAT8[dtype]).astype(np.float32)
    np.testing.assert_array_equal(dtypes.float8_values(dtype), theirs)
    finite = np.sort(theirs[np.isfinite(theirs)])
    middle = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(middle, np.float32(toward)) for toward in (-np.inf, np.inf)]
    values = np.concatenate([finite, middle, *beside, RANDOM.normal(0, 3, 10_000).astype(np.float32)])
    ours = dtypes.float8_from_float32(values, dtype)
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, values.astype(FLOAT8[dtype]).view(np.uint8))
    beyond = np.array([1e30, -1e30, finite[-1] * 1.0001], np.float32)
    assert dtypes.float8_values(dtype)[dtypes.float8_from_float32(beyond, dtype)].tolist() == [
        *(finite[-1], -finite[-1], finite[-1])
    ]


@pytest.mark.parametrize("size", [1e-35, 1e-3, 1.0, 1e6])
def test_float8_keeps_its_precision_at_any_size_and_zeros(size: float) -> None:
    weights = RANDOM.normal(0, 1, (8, 512)).astype(np.float32) * np.float32(size)
    weights[3] = 0
    for name in ("fp8_e4m3", "fp8_e5m2"):
        kind, error = WEIGHT_TYPES[name], SquaredError()
        codes, scales = kind.store(weights, "FLOAT", error)
        assert not codes[3].any()
        assert np.isfinite(scales).all()
        if size > 1e-30:
            assert error.relative < MOST[name]


def test_rounding_to_bfloat16_matches_ml_dtypes() -> None:
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

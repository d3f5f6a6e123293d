"""Exact checks of an axmodel, without a tolerance.

Norm weights, biases and epsilon are compared by checksum, and the graph with that of the compiler. Scales of integer
weights must be plausible: the quantised values must use their range.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from axrun.doctor.context import OURS, Context
from axrun.doctor.graphs import CanonicalGraph, canonical, difference, unused_tensor
from axrun.doctor.report import Finding
from axrun.errors import BadInput
from axrun.format import axmodel
from axrun.format.quantised import Quantised, makers, quantised

EPSILON = "epsilon"
LARGEST = {"INT8": 64, "INT4": 4}  # minimum of the largest quantised value per scale: half of the range
ROWS = 2048  # rows per step
ZERO = 2.0**-99  # scales below this belong to rows of zeros


def checksum(vector: NDArray[Any]) -> int:
    return zlib.crc32(np.ascontiguousarray(vector, "<f4").tobytes())


def constants(context: Context, stage: str, index: int | None) -> Finding | None:
    """The first difference from the checkpoint in a layer, or in the post model if `index` is None."""
    bundle, about = context.bundle, context.figures.about
    if bundle.maker != OURS:
        return None
    listed = about.get("vectors")
    listed = listed if isinstance(listed, dict) else {}
    path = bundle.post_path if index is None else bundle.layer_path(index)
    part = "post" if index is None else f"layer {index}"
    try:
        model = axmodel.read(path)
    except BadInput:
        return None  # reported by the stage files
    if other := _other_layers(model, index):
        seen = f"weights of layer {', '.join(other)}"
        cause = f"it is the axmodel of layer {other[0]}: two layers were swapped, or one was copied over another"
        return _finding(stage, part, path.name, f"weights of {part}", seen, cause)
    for name, tensor in model.initializers.items():
        if tensor.dtype == "FLOAT" and name in listed and checksum(tensor.array()) != listed[name]:
            words = _words(tensor.array())
            cause = f"{name} differs from the checkpoint"
            return _finding(stage, f"{part}, {name}", path.name, "the checkpoint's values", words, cause)
    if fault := _epsilon(model, about):
        expected, seen = fault
        return _finding(stage, f"{part}, epsilon of a norm", path.name, expected, seen, "not the checkpoint's epsilon")
    if wrong := unfit_scales(model):
        return _finding(stage, f"{part}, {wrong[0]}", path.name, *wrong[1:])
    if changed := _graph(model, about.get("graphs"), bundle.manifest, index):
        return _finding(stage, f"{part}, graph", path.name, "the graph that axc writes", "a different graph", changed)
    return None


def _other_layers(model: axmodel.Axmodel, index: int | None) -> list[str]:
    """Other layers whose weights are in the file."""
    named = {name.split(".")[2] for name in model.initializers if name.startswith("model.layers.")}
    return sorted(named - {str(index)})


def _graph(model: axmodel.Axmodel, known: object, manifest: Mapping[str, Any], index: int | None) -> str:
    """The difference from the compiler's graph, if the bundle was made by the compiler that stored it."""
    if not isinstance(known, dict) or known.get("digest") != manifest["tools"].get("digest"):
        return unused_tensor(model)
    distinct, layers = known.get("distinct"), known.get("layers")
    wanted = known.get("post")
    if index is not None:
        try:
            wanted = distinct[layers[index]]  # type: ignore[index]
        except (TypeError, IndexError, KeyError):
            wanted = None
    expected = CanonicalGraph.parse(wanted)
    changed = "" if expected is None else difference(canonical(model, index, expected.constants), expected, index)
    return changed or unused_tensor(model)


def unfit_scales(model: axmodel.Axmodel) -> tuple[str, str, str, str] | None:
    """Part, expected, seen and cause of the first implausible scale."""
    made_by = makers(model)
    for node in model.nodes:
        packed = quantised(model, node, made_by)
        if packed is None or any(part.raw is None for part in packed.parts):
            continue
        matrix, factors = packed.levels, packed.scales
        scales = factors.array().reshape(-1)
        bad = np.flatnonzero(~np.isfinite(scales))
        if len(bad):
            words = f"{scales[bad[0]]} at {_place(bad[0], factors)}"
            return factors.name, "finite scales", words, f"{len(bad)} of {len(scales)} scales are not finite"
        if matrix.dims[1] % packed.block or matrix.dtype not in LARGEST:
            continue
        largest = _largest(packed)
        bad = np.flatnonzero((largest < LARGEST[matrix.dtype]) & (np.abs(scales) > ZERO))
        if len(bad):
            wanted = f"a largest quantised value of at least {LARGEST[matrix.dtype]}"
            beside = "" if packed.zeros is None else " from the zero point"
            words = f"{largest[bad[0]]}{beside} in {_place(bad[0], factors)}, with a scale of {scales[bad[0]]:.3g}"
            cause = f"{len(bad)} of {len(scales)} scales are far too large: values are rounded to few levels or to zero"
            return matrix.name, wanted, words, cause
    return None


def _largest(packed: Quantised) -> NDArray[Any]:
    """The largest absolute quantised value per scale, relative to the zero point."""
    matrix = packed.levels
    count = matrix.dims[0] * packed.blocks
    if packed.zeros is not None:
        return np.concatenate([_from_zero(packed, row) for row in range(0, matrix.dims[0], ROWS)])
    if matrix.dtype == "INT4" and packed.block % 2:  # blocks that begin inside a byte
        rows = packed.level_rows(0, matrix.dims[0]).reshape(count, -1)
    else:
        rows = matrix.array().reshape(count, -1)
    if rows.dtype == np.int8:
        return np.asarray(np.maximum(rows.max(axis=1).astype(np.int16), -rows.min(axis=1).astype(np.int16)))
    sizes = np.abs((np.arange(16) ^ 8) - 8).astype(np.uint8)
    pairs = np.maximum(sizes[np.arange(256) & 15], sizes[np.arange(256) >> 4])
    return np.asarray(pairs[rows].max(axis=1))


def _from_zero(packed: Quantised, start: int) -> NDArray[np.int16]:
    """Like `_largest`, for ROWS rows with zero points."""
    stop = min(start + ROWS, packed.levels.dims[0])
    levels = packed.level_rows(start, stop).reshape(stop - start, packed.blocks, -1).astype(np.int16)
    zeros = packed.zero_rows(start, stop)[:, :, None]
    return np.asarray(np.abs(levels - zeros).max(axis=2).reshape(-1))


def _place(number: int, factors: axmodel.Tensor) -> str:
    """The row and block of a scale."""
    blocks = factors.dims[1] if len(factors.dims) > 1 else 1
    return f"row {number // blocks}" + (f", block {number % blocks}" if blocks > 1 else "")


def _epsilon(model: axmodel.Axmodel, about: Mapping[str, Any]) -> tuple[str, str] | None:
    wanted = about.get(EPSILON)
    if not isinstance(wanted, float):
        return None
    for node in model.nodes:
        value = node.attributes.get("epsilon", 1e-5)  # ONNX's default
        if node.op_type == "RMSNormalization" and isinstance(value, float) and np.float32(value) != np.float32(wanted):
            return f"{wanted:g}", f"{value:.3g}"
    return None


def _words(vector: NDArray[Any]) -> str:
    if not vector.any():
        return "all zero"
    if (vector == 1).all():
        return "all one"
    return f"mean {vector.mean():.4g}, root mean square {np.sqrt((vector**2).mean()):.4g}"


def _finding(stage: str, part: str, file: str, expected: str, seen: str, cause: str) -> Finding:
    return Finding(stage, part, file, expected, seen, cause, "Build the bundle again.")

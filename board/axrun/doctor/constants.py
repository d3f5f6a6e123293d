"""Small constants of the axmodels beside the checkpoint's, by checksum: norm weights, biases and epsilon.

Quantised weights come out near the checkpoint's only; these come out the same to the bit, so nothing hides in noise.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from axrun.doctor.context import OURS, Context
from axrun.doctor.report import Finding
from axrun.errors import BadInput
from axrun.format import axmodel

EPSILON = "epsilon"


def checksum(vector: NDArray[Any]) -> int:
    return zlib.crc32(np.ascontiguousarray(vector, "<f4").tobytes())


def constants(context: Context, stage: str, index: int | None) -> Finding | None:
    """What is not the checkpoint's in a layer, or in the post model where `index` is None."""
    bundle, about = context.bundle, context.figures.about
    listed = about.get("vectors")
    if bundle.maker != OURS or not isinstance(listed, dict):
        return None
    path = bundle.post_path if index is None else bundle.layer_path(index)
    part = "post" if index is None else f"layer {index}"
    try:
        model = axmodel.read(path)
    except BadInput:
        return None  # the stage files says it
    for name, tensor in model.initializers.items():
        if tensor.dtype == "FLOAT" and name in listed and checksum(tensor.array()) != listed[name]:
            words = _words(tensor.array())
            cause = f"{name} is not the checkpoint's"
            return _finding(stage, f"{part}, {name}", path.name, "the checkpoint's values", words, cause)
    if fault := _epsilon(model, about):
        expected, seen = fault
        return _finding(stage, f"{part}, epsilon of a norm", path.name, expected, seen, "eps is not the checkpoint's")
    return None


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
    return f"mean {vector.mean():.4g}, root of mean square {np.sqrt((vector**2).mean()):.4g}"


def _finding(stage: str, part: str, file: str, expected: str, seen: str, cause: str) -> Finding:
    return Finding(stage, part, file, expected, seen, cause, "Build the bundle again.")

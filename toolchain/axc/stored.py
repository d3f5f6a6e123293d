"""Stored tensors: their names and descriptions, known before data are read, and their element types."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from axrun.format.dtypes import bf16_to_f32

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# safetensors' names of the element types a checkpoint may hold -> ONNX's
STORED_DTYPES = {"F32": "FLOAT", "F16": "FLOAT16", "BF16": "BFLOAT16", "F64": "DOUBLE"}
# types that only quantised checkpoints have -> numpy's
PACKED_DTYPES = {"I8": "i1", "U8": "u1", "I32": "<i4", "I64": "<i8", "F8_E4M3": "u1"}

# the bits of positive infinity; without the sign bit, values that are not finite are at or above them
INFINITY = {"FLOAT": 0x7F800000, "FLOAT16": 0x7C00, "BFLOAT16": 0x7F80, "DOUBLE": 0x7FF0000000000000}
BLOCK_ELEMENTS = 1 << 16  # read at a time: three float32 blocks of these stay in a core's L2 cache


class Rows(Protocol):
    """Reads a tensor."""

    def __call__(self, start: int, stop: int, /) -> NDArray[Any]:
        """Rows [start, stop) along the first dimension; bfloat16 as uint16."""


class LevelRows(Rows, Protocol):
    """Reads a matrix with a grid."""

    def levels(self, start: int, stop: int) -> tuple[NDArray[Any], ...]:
        """Rows [start, stop): levels int8 [n, in], scales float32 [n, in / block], and zero points if any."""


class ReorderedRows(LevelRows, Protocol):
    """Reads a matrix whose blocks are contiguous in another order of the columns."""

    def order(self) -> NDArray[np.int64]:
        """The column order of `levels`."""


@dataclass(frozen=True)
class Grid:
    """A matrix is stored as integer levels from `low` to `high`, with a scale for each `block` values along a row.

    Each of its values is the float32 product of a scale, which `scale_dtype` holds, and a level, with `zero_points`
    less the block's one of the same range. `reordered`: a digest of the order of columns in which blocks are
    contiguous, where that is not their own.
    """

    low: int
    high: int
    block: int
    scale_dtype: str = "FLOAT"
    zero_points: bool = False
    reordered: str = ""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the checkpoint. `key` is its name in the file.

    `dtype` is what its rows are read as. `packed` names the format they are stored in where that is another, and
    `grid` says what it is exactly where it is a Grid.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    key: str
    packed: str = ""
    grid: Grid | None = None


def stored(file: Path, key: str, dtype: str, shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor(loaded_name(key), STORED_DTYPES.get(dtype, dtype), shape, file, key)


# children of a base model such as LlamaModel, which a causal language model has under `model.`
BASE_MODEL = ("embed_tokens", "layers", "norm")


def loaded_name(key: str) -> str:
    """The name transformers gives a tensor: it adds or removes the base model's prefix (`rename_source_key`)."""
    if key == f"model.{HEAD}":
        return HEAD
    return f"model.{key}" if key.partition(".")[0] in BASE_MODEL else key


def widen(block: NDArray[Any], dtype: str, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """A stored block as float32 (exact but for float64), in `out` where one is given. Raises OverflowError."""
    if dtype == "BFLOAT16":
        return bf16_to_f32(block, out)
    out = np.empty(block.shape, np.float32) if out is None else out
    with np.errstate(over="ignore"):  # raised below, with the value
        np.copyto(out, block, casting="same_kind")
    if dtype == "DOUBLE" and not np.isfinite(out).all():
        raise OverflowError(f"{block.flat[np.abs(block).argmax()]:g}, too large for float32")
    return out

"""The KV cache, one buffer per layer, and the attention masks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from axrun.format.axmodel import BLOCKED
from axrun.format.dtypes import from_float32

Array = NDArray[Any]


@dataclass
class KVCache:
    """Row i of `keys[layer]` and `values[layer]`, each [1, rows, width], belongs to the token at position i.

    The width is 0 in layers that keep nothing.
    `length` rows hold tokens. Rows after them must be finite: the mask hides any value except a NaN.
    """

    keys: Sequence[Array]
    values: Sequence[Array]
    length: int = 0

    def prepare(self, position: int, count: int) -> None:
        """Drops the tokens from `position` on, and makes their rows writable for `count` new ones."""
        self.truncate(position)

    def write(self, layer: int, position: int, keys: Array, values: Array) -> None:
        """Copies rows [1, n, width] of one layer to position, position + 1, ..."""
        stop = position + keys.shape[1]
        self.keys[layer][:, position:stop] = keys
        self.values[layer][:, position:stop] = values

    @functools.cached_property
    def addresses(self) -> tuple[Array, Array]:
        """Of the keys and the values of each layer, uint64."""
        keys, values = (
            np.array([array.ctypes.data for array in arrays], np.uint64) for arrays in (self.keys, self.values)
        )
        return keys, values

    def clear(self, position: int, count: int) -> None:
        """Zeroes rows that a failed run left."""
        for array in (*self.keys, *self.values):
            array[:, position : position + count] = 0

    def read(self, position: int, count: int) -> bytes:
        """The rows of `count` tokens from `position` on, of all layers."""
        return b"".join(array[:, position : position + count].tobytes() for array in (*self.keys, *self.values))

    def restore(self, position: int, count: int, rows: bytes) -> None:
        """Writes what `read` returned, and drops the tokens behind it."""
        self.prepare(position, count)
        begin = 0
        for array in (*self.keys, *self.values):
            target = array[:, position : position + count]
            target[...] = np.frombuffer(rows, array.dtype, target.size, begin).reshape(target.shape)
            begin += target.nbytes
        self.length = position + count

    def nbytes_of(self, count: int) -> int:
        """Bytes of the rows of `count` tokens."""
        return sum(array[:, :count].nbytes for array in (*self.keys, *self.values))

    def truncate(self, length: int) -> None:
        """Drops the tokens from position `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} tokens to {length}")
        end, self.length = self.length, length  # first, so that an interrupt cannot leave tokens without rows
        if length < end:
            for array in (*self.keys, *self.values):
                array[:, length:end] = 0

    def keep(self, length: int) -> None:
        """Drops the tokens from position `length` on, and clears all rows there, also those of a failed run."""
        self.length = self.keys[0].shape[1]
        self.truncate(length)

    def reset(self) -> None:
        """Drops all tokens."""
        self.truncate(0)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (*self.keys, *self.values))


def visible_and_blocked(dtype: str) -> tuple[Any, Any]:
    """The two values of a mask, in the numpy type of a FLOAT, FLOAT16 or BFLOAT16 tensor; FLOAT16 has no -65536."""
    lowest = max(BLOCKED, -65504.0) if dtype == "FLOAT16" else BLOCKED
    visible, blocked = from_float32(np.array([0.0, lowest], np.float32), dtype)
    return visible, blocked


def fill_mask(mask: Array, past: int, count: int, visible: Any, blocked: Any) -> None:
    """Writes a mask [1, M, T + M] for `count` tokens after `past` cached ones (past <= T, count <= M).

    Token j attends to the cached rows 0..past-1 and to the new rows 0..j. Rows from `count` on are padding and attend
    only to themselves, which keeps their softmax finite.
    """
    tokens = mask.shape[1]
    history = mask.shape[2] - tokens
    mask[...] = blocked
    mask[0, :count, :past] = visible
    current = mask[0, :, history:]
    current[np.arange(tokens), np.arange(tokens)] = visible
    current[:count, :count][np.tri(count, k=-1, dtype=bool)] = visible


def hide_before_window(mask: Array, past: int, count: int, window: int, blocked: Any) -> None:
    """Blocks rows at a distance of `window` tokens or more in a mask of `fill_mask`."""
    tokens = mask.shape[1]
    history = mask.shape[2] - tokens
    distance = np.arange(past, past + count)[:, None] - np.arange(past)[None, :]
    mask[0, :count, :past][distance >= window] = blocked
    mask[0, :count, history : history + count][np.tri(count, k=-window, dtype=bool)] = blocked

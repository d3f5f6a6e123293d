"""Rows of a GGUF's tensors: dequantised by the gguf package, or as the stored integer levels and scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

from axc.checkpoints.gguf.container import TensorEntry
from axc.stored import Grid
from axrun.errors import BadInput

# read unchanged; I8 and other integers have no meaning as weights
PLAIN = {"F32": ("FLOAT", np.float32), "F16": ("FLOAT16", np.float16), "BF16": ("BFLOAT16", np.uint16)}
PLAIN |= {"F64": ("DOUBLE", np.float64)}

Patch = tuple[tuple[int, bytes], ...]  # (offset in a block, bytes to write there)
ONE = np.float16(1).tobytes()


@dataclass(frozen=True)
class Packing:
    """A block format whose values are products of a scale and an integer level.

    The package does all the unpacking: dequantising with every scale set to 1 (`unit_scales`) gives the levels, with
    every level set to 1 (`unit_levels`) the scales. Layouts: ggml-common.h of ggml.
    """

    grid: Grid
    unit_scales: Patch
    unit_levels: Patch


PACKINGS: Mapping[str, Packing] = MappingProxyType(
    {
        "Q4_0": Packing(Grid(-8, 7, 32), ((0, ONE),), ((2, b"\x99" * 16),)),
        "Q5_0": Packing(Grid(-16, 15, 32), ((0, ONE),), ((2, b"\xff" * 4 + b"\x11" * 16),)),
        "Q8_0": Packing(Grid(-127, 127, 32), ((0, ONE),), ((2, b"\x01" * 32),)),
        "IQ4_NL": Packing(Grid(-127, 113, 32), ((0, ONE),), ((2, b"\x88" * 16),)),
        "MXFP4": Packing(Grid(-12, 12, 32), ((0, b"\x80"),), ((1, b"\x11" * 16),)),
        # a float16 scale a block, times one of 6 bits for each 32 or 16 values: 33 stands for 1
        "IQ4_XS": Packing(Grid(-127, 113, 32), ((0, ONE + b"\xaa\xaa" + b"\x11" * 4),), ((8, b"\x88" * 128),)),
        "Q3_K": Packing(Grid(-4, 3, 16), ((96, b"\x11" * 8 + b"\xaa" * 4 + ONE),), ((0, b"\xff" * 32 + b"\x55" * 64),)),
        # and of 8 bits for each 16
        "Q6_K": Packing(Grid(-32, 31, 16), ((192, b"\x01" * 16 + ONE),), ((0, b"\x11" * 128 + b"\xaa" * 64),)),
    }
)


def dtype_of(kind: GGMLQuantizationType) -> str:
    """The type in which rows are read, by ONNX's name; its own name if it cannot be read."""
    if kind.name in PLAIN:
        return PLAIN[kind.name][0]
    return "FLOAT" if kind in quants._type_traits else kind.name


class Rows:
    """Reads rows of one tensor. `order`: the row of the file for each row; None: the same."""

    def __init__(self, data: NDArray[np.uint8], entry: TensorEntry, order: NDArray[np.int64] | None) -> None:
        self.entry, self.order = entry, order
        whole = data[entry.offset : entry.offset + entry.nbytes]
        self.rows = whole.reshape(entry.shape[0], -1) if entry.nbytes else whole
        self.packing = PACKINGS.get(entry.kind.name)

    def __call__(self, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop), as `dtype_of` says."""
        raw, kind = self._raw(start, stop), self.entry.kind
        shape = (len(raw), *self.entry.shape[1:])
        if kind.name in PLAIN:
            return raw.view(PLAIN[kind.name][1]).reshape(shape)
        with np.errstate(over="ignore", invalid="ignore"):  # infinite scales: refused by the caller
            return np.asarray(quants.dequantize(raw, kind)).reshape(shape)

    def levels(self, start: int, stop: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Levels int8 [n, in] and scales float32 [n, in / block] of rows [start, stop). Raises BadInput."""
        assert self.packing is not None
        raw, size = self._raw(start, stop), quants._type_traits[self.entry.kind].type_size
        blocks = raw.reshape(-1, size)
        levels = self._patched(blocks, self.packing.unit_scales).reshape(len(raw), -1)
        if levels.min() < self.packing.grid.low:
            raise BadInput(
                f"tensor {self.entry.name} holds level {int(levels.min())}; {self.entry.kind.name} as llama.cpp writes "
                f"it begins at {self.packing.grid.low}\nThe file is damaged; get it again."
            )
        with np.errstate(over="ignore", invalid="ignore"):
            scales = self._patched(blocks, self.packing.unit_levels).reshape(len(raw), -1)
        return levels.astype(np.int8), np.ascontiguousarray(scales[:, :: self.packing.grid.block])

    def _raw(self, start: int, stop: int) -> NDArray[np.uint8]:
        found = self.rows[start:stop] if self.order is None else self.rows[self.order[start:stop]]
        return np.ascontiguousarray(found)

    def _patched(self, blocks: NDArray[np.uint8], patch: Patch) -> NDArray[np.float32]:
        blocks = blocks.copy()
        for at, content in patch:
            blocks[:, at : at + len(content)] = np.frombuffer(content, np.uint8)
        return np.asarray(quants.dequantize(blocks, self.entry.kind))

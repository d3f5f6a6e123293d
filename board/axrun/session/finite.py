"""Check for infinities and NaNs in outputs, for engines that do not check themselves.

An infinity or a NaN has an exponent of all ones. The check works on the bits: numpy has no bfloat16, and for float16 it
is as fast as any other way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from axrun.errors import NotFinite
from axrun.format.axmodel import TensorInfo

Array = NDArray[Any]

# dtype: (unsigned type of the same width, exponent mask)
EXPONENTS: dict[str, tuple[str, int]] = {
    "FLOAT": ("<u4", 0x7F800000),
    "FLOAT16": ("<u2", 0x7C00),
    "BFLOAT16": ("<u2", 0x7F80),
}
PIECE = 1 << 18  # elements per step, so that temporaries stay in the CPU cache


class FiniteCheck:
    """Checks the outputs of a binding after each run. Arrays are [1, rows, width]."""

    def __init__(self, part: str, outputs: Sequence[TensorInfo], arrays: Mapping[str, Array]) -> None:
        """`arrays` are the bound outputs. `part` names the axmodel in errors."""
        self._part = part
        self._tensors: list[tuple[str, Array, Any]] = []
        self._pieces: list[tuple[Array, Any]] = []
        for info in outputs:
            if info.name in arrays and info.dtype in EXPONENTS:
                kind, exponent = EXPONENTS[info.dtype]
                bits, mask = arrays[info.name].view(kind), np.dtype(kind).type(exponent)
                self._tensors.append((info.name, bits, mask))
                flat = bits.reshape(-1)
                self._pieces += [(flat[at : at + PIECE], mask) for at in range(0, len(flat), PIECE)]

    def __call__(self) -> None:
        """Raises NotFinite with the first row of an output that holds an infinity or a NaN."""
        for bits, mask in self._pieces:
            if (bits & mask).max() == mask:
                self._find()

    def _find(self) -> None:
        rows = {
            name: np.flatnonzero(((bits & mask) == mask).any(axis=(0, 2)))[:1] for name, bits, mask in self._tensors
        }
        found = {name: int(row[0]) for name, row in rows.items() if len(row)}
        name = min(found, key=lambda name: found[name])
        raise NotFinite(self._part, name, found[name])

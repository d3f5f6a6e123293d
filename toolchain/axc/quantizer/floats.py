"""Weights kept as floats: fp32, fp16, bf16, rounded to the nearest where they shrink."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from axc.stored import INFINITY, widen
from axrun.format.dtypes import DTYPES, from_float32

if TYPE_CHECKING:
    from axc.quantizer import Part, SquaredError


@dataclass(frozen=True)
class Float:
    """One tensor of the checkpoint's name and shape."""

    dtype: str
    group: int = 0

    @property
    def bits(self) -> float:
        return DTYPES[self.dtype].bits

    def parts(self, name: str, out_features: int, in_features: int) -> list[Part]:
        return [(name, self.dtype, (out_features, in_features))]

    def dequantize(self, in_features: int) -> dict[str, int]:
        return {}

    def store(self, block: NDArray[Any], dtype: str, error: SquaredError) -> Iterator[NDArray[Any]]:
        yield convert(block, dtype, self.dtype)


def convert(block: NDArray[Any], stored: str, dtype: str) -> NDArray[Any]:
    """A block of a finite checkpoint in another float type. Raises OverflowError for a value that does not fit."""
    if stored == dtype:
        return block
    values = widen(block, stored)
    with np.errstate(over="ignore"):  # said below, with the value
        converted = from_float32(values, dtype)
    infinity = np.array(INFINITY[dtype], f"u{converted.itemsize}")
    if ((converted.view(infinity.dtype) & infinity) == infinity).any():
        raise OverflowError(f"{block.flat[np.abs(values).argmax()]:g}, too large for {dtype}")
    return converted

"""8-bit floats, E4M3FN and E5M2, one scale for each row, round to nearest.

The scale maps the largest magnitude of a row to the largest finite value: without one, weights around 0.003 fall among
E4M3FN's subnormals and their relative error is 19 % instead of the 2.7 % (5.3 % for E5M2) that the mantissa leaves.
What lies below 2^-15 of E4M3FN's largest weight of a row still does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from axc.quantizer.round_to_nearest import SMALLEST
from axc.stored import widen
from axrun.format.dtypes import FLOAT8, float8_from_float32, float8_values

if TYPE_CHECKING:
    from axc.quantizer import Part, SquaredError


@dataclass(frozen=True)
class ScaledFloat8:
    """A float8 of the checkpoint's name and shape, and `<name>_scale`, float32, one for each row."""

    dtype: str
    bits: float = 8
    group: int = 0

    def parts(self, name: str, out_features: int, in_features: int) -> list[Part]:
        return [(name, self.dtype, (out_features, in_features)), (name + "_scale", "FLOAT", (out_features,))]

    def dequantize(self, in_features: int) -> dict[str, int]:
        return {"axis": 0}

    def store(self, block: NDArray[Any], dtype: str, error: SquaredError) -> Iterator[NDArray[Any]]:
        weights = widen(block, dtype)
        scales = np.abs(weights).max(axis=1) / np.float32(FLOAT8[self.dtype].largest)
        scales = np.maximum(scales, SMALLEST["FLOAT"])
        codes = float8_from_float32(weights / scales[:, None], self.dtype)
        lost = float8_values(self.dtype)[codes] * scales[:, None] - weights
        error.noise += float(np.square(lost, dtype=np.float64).sum())
        error.signal += float(np.square(weights, dtype=np.float64).sum())
        yield codes
        yield scales

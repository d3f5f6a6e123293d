"""Weight types: how a matrix [out, in] is stored, and how it comes back as float32.

One algorithm per file; the table below names what `-w` and `--post_weight_type` may ask for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from axc.quantizer.float8 import ScaledFloat8
from axc.quantizer.floats import Float
from axc.quantizer.round_to_nearest import RoundToNearest

Part = tuple[str, str, tuple[int, ...]]


@dataclass
class SquaredError:
    """Sums over a matrix: of squared differences between stored and checkpoint, and of the checkpoint's squares."""

    noise: float = 0.0
    signal: float = 0.0

    @property
    def relative(self) -> float:
        """Root of noise over signal: 0 is exact."""
        return float((self.noise / self.signal) ** 0.5) if self.signal else 0.0


class WeightType(Protocol):
    """A way to store a matrix in one or more tensors of an axmodel."""

    @property
    def bits(self) -> float:
        """Bits per weight, scales included."""

    @property
    def group(self) -> int:
        """How many values along a row share a scale at most; 0: the whole row, or there are no scales."""

    def parts(self, name: str, out_features: int, in_features: int) -> list[Part]:
        """(tensor name, dtype, dims) of what is stored, in the order of the file."""

    def dequantize(self, in_features: int) -> dict[str, int]:
        """Attributes of the DequantizeLinear that brings two parts together."""

    def store(self, block: NDArray[Any], dtype: str, error: SquaredError) -> Iterator[NDArray[Any]]:
        """One array for each part, from a block of whole rows as the checkpoint stores them."""


WEIGHT_TYPES: dict[str, WeightType] = {
    "fp32": Float("FLOAT"),
    "fp16": Float("FLOAT16"),
    "bf16": Float("BFLOAT16"),
    "s8": RoundToNearest("INT8", 0),
    "s4": RoundToNearest("INT4", 128),
    "fp8_e4m3": ScaledFloat8("FLOAT8E4M3FN"),
    "fp8_e5m2": ScaledFloat8("FLOAT8E5M2"),
}

"""Weights kept as floats: fp32, fp16, bf16, rounded to the nearest where they shrink."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from board.dtypes import DTYPES, from_float32
from board.errors import BadInput
from toolchain.checkpoint import widen

if TYPE_CHECKING:
    from toolchain.quantizer import Part, SquaredError


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
        """Raises BadInput when fp16 overflows."""
        if dtype == self.dtype:
            yield block
            return
        values = widen(block, dtype)
        if self.dtype == "FLOAT16" and float(np.abs(values).max(initial=0)) >= 65520:
            raise BadInput(f"a weight of {np.abs(values).max():g} does not fit fp16; use -w bf16 or s8")
        yield from_float32(values, self.dtype)

"""Integer levels that the checkpoint has already: they and their scales are written as they are, without loss."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from axc.stored import StoredTensor
from axrun.errors import BadInput
from axrun.format.dtypes import DTYPES as ELEMENTS
from axrun.format.dtypes import from_float32, to_float32
from axrun.format.quantised import pack4

if TYPE_CHECKING:
    from axc.quantizer import Part, SquaredError

DTYPES = {"s4": "INT4", "s8": "INT8"}
HELD = {"INT8": (-128, 127), "INT4": (-8, 7)}  # levels; round_to_nearest does not use -128
BLOCK4 = 128  # the longest 4-bit block that an engine multiplies as it is
ZERO_POINTS = 2  # the number of their part


@dataclass(frozen=True)
class Kept:
    """INT8 or INT4 of the checkpoint's name and shape, and `<name>_scale`, one for each block of a row.

    `tensor` is the checkpoint's name of it, `start` its first row there, `packed` the format. `zero_points`: there is
    also `<name>_zero_point` of the levels' type and the scales' shape, and value = (level - zero point) x scale.
    `repeat`: blocks that share a scale of the checkpoint. `reordered`: a digest of the checkpoint's `order` of columns,
    where they are in that and the input is gathered so. `calibrated`: the levels are those of a calibration, and the
    checkpoint holds the values that they stand for, so that their error is measured.
    """

    dtype: str
    block: int
    tensor: str
    packed: str
    scale_dtype: str = "FLOAT"
    zero_points: bool = False
    repeat: int = 1
    reordered: str = ""
    calibrated: bool = False
    start: int = 0

    @property
    def bits(self) -> float:
        level = ELEMENTS[self.dtype].bits
        return level + (ELEMENTS[self.scale_dtype].bits + self.zero_points * level) / self.block

    @property
    def group(self) -> int:
        return self.block

    def parts(self, name: str, out_features: int, in_features: int) -> list[Part]:
        scales = (out_features, in_features // self.block)
        parts: list[Part] = [
            (name, self.dtype, (out_features, in_features)),
            (name + "_scale", self.scale_dtype, scales),
        ]
        return [*parts, (name + "_zero_point", self.dtype, scales)] if self.zero_points else parts

    def dequantize(self, in_features: int) -> dict[str, int]:
        return {"axis": 1, "block_size": self.block}

    def store(self, block: NDArray[Any], dtype: str, error: SquaredError) -> Iterator[NDArray[Any]]:
        raise TypeError("levels are written as they are")

    def write(
        self, levels: NDArray[np.int8], scales: NDArray[np.float32], zeros: NDArray[np.int8] | None = None
    ) -> Iterator[NDArray[Any]]:
        """One array for each part, from levels [n, in], scales and zero points of the checkpoint in the levels' range.

        4-bit zero points stay one to a byte: rows of them may end inside a byte, so that they are packed together
        (`finish`). Raises OverflowError for a scale that `scale_dtype` does not hold exactly, TypeError for zero points
        that are missing or not expected.
        """
        if (zeros is not None) != self.zero_points:
            raise TypeError(f"{self.tensor}: zero points are {'missing' if self.zero_points else 'not expected'}")
        if self.repeat > 1:
            scales = np.repeat(scales, self.repeat, axis=1)
            zeros = None if zeros is None else np.repeat(zeros, self.repeat, axis=1)
        yield pack4(levels) if self.dtype == "INT4" else levels
        with np.errstate(over="ignore"):  # said below, with the value
            stored = from_float32(scales, self.scale_dtype)
        inexact = to_float32(stored, self.scale_dtype) != scales
        if inexact.any():
            raise OverflowError(f"scale {scales[inexact].flat[0]:g}, which {self.scale_dtype} does not hold exactly")
        yield stored
        if zeros is not None:
            yield zeros

    def finish(self, part: int, arrays: list[NDArray[Any]]) -> Iterator[NDArray[Any]]:
        """All of part `part` as the file holds it, from what `write` gave."""
        if part == ZERO_POINTS and self.dtype == "INT4":
            yield pack4(np.concatenate(arrays))
        else:
            yield from arrays


def keep(weight_type: str, stored: StoredTensor) -> Kept | None:
    """How `weight_type` holds a tensor exactly as it is stored; None where it does not, or is stored otherwise."""
    grid, dtype = stored.grid, DTYPES.get(weight_type)
    if grid is None or dtype is None or not HELD[dtype][0] <= grid.low <= grid.high <= HELD[dtype][1]:
        return None
    block = grid.block if dtype == "INT8" else _block4(grid.block)
    return Kept(
        dtype=dtype,
        block=block,
        tensor=stored.name,
        packed=stored.packed,
        scale_dtype=grid.scale_dtype,
        zero_points=grid.zero_points,
        repeat=grid.block // block,
        reordered=grid.reordered,
    )


def _block4(block: int) -> int:
    """Blocks that a longer one, such as a whole row, is cut into."""
    return next((size for size in (BLOCK4, BLOCK4 // 2, BLOCK4 // 4) if block > size and block % size == 0), block)


def decide(
    flag: str, asked: str | None, tensors: Mapping[str, StoredTensor], calibrated: Collection[str] = ()
) -> tuple[str, dict[str, Kept], list[str]]:
    """The type of these matrices, those that keep their levels, and what is to be said of the others.

    Without `asked`: the smallest type that holds all that is quantised already; s8 if there are floats. `calibrated`
    are the matrices that a calibration has levels for. Raises BadInput where no type does.
    """
    packed = {name: stored for name, stored in tensors.items() if stored.packed}
    choices = [asked] if asked else ["s4", "s8"] if len(packed) == len(tensors) else ["s8"]
    for weight_type in choices:
        kept = _kept(weight_type, packed)
        if asked or len(kept) == len(packed):
            break
    else:
        _refuse(flag, next(stored for name, stored in packed.items() if name not in kept))
    lost = {name: stored for name, stored in packed.items() if name not in kept}
    notes = []
    for choice, dtype in DTYPES.items():
        own = [found for found in kept.values() if found.dtype == dtype]
        kinds = ", ".join(sorted({found.packed for found in own}))
        if own:
            notes.append(f"{_count(own)} stored as {kinds} kept as {choice}: the same levels and scales")
    if lost and weight_type != "fp32":
        kinds = ", ".join(sorted({stored.packed for stored in lost.values()}))
        how = ", calibrated" if lost.keys() <= set(calibrated) else ""
        if weight_type == "s4" and not how:
            how = ", rounded to nearest and not calibrated"
        notes.append(f"{_count(lost)} stored as {kinds} dequantised, and stored again as {weight_type}{how}: not exact")
    return weight_type, kept, notes


def _kept(weight_type: str, packed: Mapping[str, StoredTensor]) -> dict[str, Kept]:
    """The matrices that keep their levels in a type; if s4 keeps some, those with more than 4 bits do in s8."""
    kept = {name: found for name, stored in packed.items() if (found := keep(weight_type, stored))}
    if weight_type == "s4" and kept:
        wide = {name: keep("s8", stored) for name, stored in packed.items() if name not in kept}
        kept |= {name: found for name, found in wide.items() if found}
    return kept


def _refuse(flag: str, stored: StoredTensor) -> None:
    raise BadInput(
        f"{stored.file}: {stored.key} is stored as {stored.packed}, which no integer type keeps as it is\n"
        f"Quantise it again with a loss: {flag} s8, s4 or a float type."
    )


def _count(matrices: Any) -> str:
    return f"{len(matrices)} {'matrix' if len(matrices) == 1 else 'matrices'}"

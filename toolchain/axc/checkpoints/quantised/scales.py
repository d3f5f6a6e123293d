"""Checks the scales of quantised matrices before a build: nothing later would notice a wrong scale.

The packages write no scale of 0, not even for a group of zeros: GPTQ replaces an empty range, the others limit scales
from below. A 0 is float16 underflow or damage. Negative scales are valid in integer formats: AutoRound writes them for
symmetric types, whose level -8 reaches further than 7.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from axc.checkpoints.quantised.matrix import AGAIN, Floats, Integers, Matrix
from axrun.errors import BadInput

ROWS = 512  # read at a time
LARGEST = float(np.finfo(np.float32).max)


class Zeros(NamedTuple):
    """Groups with a scale of 0 whose levels are not 0: how many, and the first."""

    groups: int = 0
    first: str = ""


def remarks(matrices: Iterable[Matrix]) -> list[str]:
    """Remarks on scales of 0. Raises BadInput for scales that no package writes."""
    found = [zeros for matrix in matrices if (zeros := _checked(matrix)).groups]
    if not found:
        return []
    count = sum(zeros.groups for zeros in found)
    many = f"{count} groups have" if count > 1 else "1 group has"
    where = f"{len(found)} {'matrices' if len(found) > 1 else 'matrix'}"
    which = f"in {where}, the first is {found[0].first}" if count > 1 else found[0].first
    return [f"{many} the scale 0 ({which}): their weights are 0, whatever their levels are"]


def _checked(matrix: Matrix) -> Zeros:
    """The groups of a matrix with a scale of 0. Raises BadInput."""
    stored, rows = matrix.stored, matrix.rows
    integers = isinstance(rows, Integers)
    largest = LARGEST / (255 if integers else 448)  # levels less zero points, e4m3
    count, first, any_scale = 0, "", False
    for start in range(0, stored.shape[0], ROWS):
        stop = min(start + ROWS, stored.shape[0])
        scales: Floats = rows.group_scales(start, stop)
        wrong = ~(np.abs(scales) <= largest) if integers else ~((scales >= 0) & (scales <= largest))
        if wrong.any():
            row, group = _first(wrong)
            raise BadInput(
                f"{stored.file}: the scale of {stored.name} at {_place(start + row, group)} is "
                f"{scales[row, group]:g}; expected a {'finite' if integers else 'finite, positive'} number\n{AGAIN}"
            )
        any_scale |= bool(scales.any())
        if not scales.all():
            lost = (scales == 0) & rows.group_levels(start, stop)
            count += int(lost.sum())
            if lost.any() and not first:
                row, group = _first(lost)
                first = f"{stored.name} at {_place(start + row, group)}"
    if count and not any_scale:
        raise BadInput(f"{stored.file}: all scales of {stored.name} are 0, and its levels are not\n{AGAIN}")
    return Zeros(count, first)


def _first(where: NDArray[np.bool_]) -> tuple[int, int]:
    row, group = (int(index) for index in np.argwhere(where)[0])
    return row, group


def _place(row: int, group: int) -> str:
    return f"row {row}, group {group}"

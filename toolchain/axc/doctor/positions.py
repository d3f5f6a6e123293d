"""Describes where in the context a layer is wrong: from a position on, after cached rows, or in one kind of group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from axc.doctor.visits import Visit


class Marked(NamedTuple):
    """A visit, and which of its rows are wrong: [count]."""

    visit: Visit
    wrong: NDArray[np.bool_]

    @property
    def positions(self) -> NDArray[np.intp]:
        return np.flatnonzero(self.wrong) + self.visit.start


def pattern(marked: Sequence[Marked]) -> str:
    """Describes the wrong rows; empty if all or none are wrong."""
    wrong = [entry for entry in marked if entry.wrong.any()]
    right = [entry for entry in marked if not entry.wrong.any()]
    if not wrong or (not right and all(entry.wrong.all() for entry in wrong)):
        return ""
    bad = np.unique(np.concatenate([entry.positions for entry in wrong]))
    good = np.unique(np.concatenate([np.flatnonzero(~entry.wrong) + entry.visit.start for entry in marked]))
    if not good.size:
        return ""
    if good.max() < bad.min():
        return f"right up to position {good.max()}, wrong from position {bad.min()} on"
    if {entry.visit.stage for entry in wrong}.isdisjoint(entry.visit.stage for entry in right):
        stages = sorted({entry.visit.stage for entry in wrong})
        if right:
            return f"wrong in {' and '.join(stages)} only"
    starts_wrong = [entry.visit.start for entry in wrong]
    starts_right = [entry.visit.start for entry in right]
    if starts_right and max(starts_right) < min(starts_wrong):
        return f"right after up to {max(starts_right)} cached rows, wrong after {min(starts_wrong)} and more"
    if all(entry.wrong[0] and not entry.wrong[1:].any() for entry in wrong if len(entry.wrong) > 1):
        return "wrong in the first token of a chunk only"
    if all(entry.wrong[-1] and not entry.wrong[:-1].any() for entry in wrong if len(entry.wrong) > 1):
        return "wrong in the last token of a chunk only"
    if not right:
        return ""
    return f"wrong in {', '.join(entry.visit.text for entry in wrong[:3])}; right in {right[0].visit.text}"

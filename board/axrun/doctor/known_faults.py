"""Masks and positions that are wrong in known ways: which of them a runner has, is found by trying them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from axrun.doctor.direct import Floats, causal
from axrun.format.axmodel import BLOCKED


class Slip(NamedTuple):
    """What it is, its mask, and what it adds to positions."""

    text: str
    mask: Floats
    shift: int = 0


def slips(start: int, count: int) -> Iterator[Slip]:
    """Masks and positions that are wrong in ways that have been seen."""
    right = causal(start, count)
    rows = np.arange(count)
    if start:
        last = right.copy()
        last[:, start - 1] = BLOCKED
        yield Slip("its mask hides the last row of history: off by one", last)
        first = right.copy()
        first[:, 0] = BLOCKED
        yield Slip("its mask hides the first row of history", first)
        none = right.copy()
        none[:, :start] = BLOCKED
        yield Slip("its mask hides all history", none)
        half = right.copy()
        half[:, : start // 2] = BLOCKED
        yield Slip("its mask hides the earlier half of the history: as a window would", half)
        later = right.copy()
        later[:, start // 2 : start] = BLOCKED
        yield Slip("its mask hides the later half of the history", later)
        own = right.copy()
        own[0, start] = BLOCKED
        yield Slip("its mask hides the first token of a chunk from itself", own)
    if count > 1:
        ahead = right.copy()
        ahead[rows[:-1], start + rows[:-1] + 1] = 0
        yield Slip("its mask lets a token see the next one: off by one", ahead)
        yield Slip("its mask lets every token see all others: it is not causal", np.zeros_like(right))
        behind = right.copy()
        behind[rows[1:], start + rows[1:] - 1] = BLOCKED
        yield Slip("its mask hides the token before: off by one", behind)
    for shift in (1, -1):
        yield Slip(f"the positions it gives are off by {shift:+d}", right, shift)
    if start:
        yield Slip("the positions it gives begin at 0 behind a history", right, -start)

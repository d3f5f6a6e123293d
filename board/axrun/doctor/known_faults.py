"""Known faults of masks and positions, to try which one reproduces a runner's output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from axrun.doctor.direct import Floats, causal
from axrun.format.axmodel import BLOCKED


class KnownFault(NamedTuple):
    """A description, the faulty mask, and the offset of the positions."""

    text: str
    mask: Floats
    shift: int = 0


def known_faults(start: int, count: int) -> Iterator[KnownFault]:
    """Yields the faults that have been seen in practice."""
    right = causal(start, count)
    rows = np.arange(count)
    if start:
        last = right.copy()
        last[:, start - 1] = BLOCKED
        yield KnownFault("its mask hides the last row of history: off by one", last)
        first = right.copy()
        first[:, 0] = BLOCKED
        yield KnownFault("its mask hides the first row of history", first)
        none = right.copy()
        none[:, :start] = BLOCKED
        yield KnownFault("its mask hides all history", none)
        half = right.copy()
        half[:, : start // 2] = BLOCKED
        yield KnownFault("its mask hides the earlier half of the history, like a window", half)
        later = right.copy()
        later[:, start // 2 : start] = BLOCKED
        yield KnownFault("its mask hides the later half of the history", later)
        own = right.copy()
        own[0, start] = BLOCKED
        yield KnownFault("its mask hides the first token of a chunk from itself", own)
    if count > 1:
        ahead = right.copy()
        ahead[rows[:-1], start + rows[:-1] + 1] = 0
        yield KnownFault("its mask lets a token see the next one: off by one", ahead)
        yield KnownFault("its mask lets every token see all others: it is not causal", np.zeros_like(right))
        behind = right.copy()
        behind[rows[1:], start + rows[1:] - 1] = BLOCKED
        yield KnownFault("its mask hides the previous token: off by one", behind)
    for shift in (1, -1):
        yield KnownFault(f"its positions are off by {shift:+d}", right, shift)
    if start:
        yield KnownFault("its positions start at 0 although there is a history", right, -start)

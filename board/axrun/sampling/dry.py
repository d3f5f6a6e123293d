"""DRY (Don't Repeat Yourself): lowers the logit of a token that would continue a repetition.

https://github.com/oobabooga/text-generation-webui/pull/5677
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

LONGEST = 64  # tokens of a repetition to compare


class Dry:
    """Subtracts multiplier * base ** (length - allowed) for a repetition of `length` tokens, at least `allowed`.

    No repetition extends across a token in `breakers`. `window`: number of recent tokens, None for all.
    """

    def __init__(
        self, multiplier: float, base: float, allowed: int, breakers: Collection[int], window: int | None = None
    ) -> None:
        self._multiplier, self._base, self._allowed = multiplier, base, allowed
        self._breakers, self._window = frozenset(breakers), window

    def __call__(self, logits: NDArray[np.float32], ids: Sequence[int], start: int) -> None:
        recent = np.asarray(ids if self._window is None else ids[max(len(ids) - self._window, 0) :], np.int64)
        last = len(recent) - 1
        if last < 1 or int(recent[last]) in self._breakers:
            return
        places = np.flatnonzero(recent[:last] == recent[last])
        lengths = np.ones(len(recent), np.int64)
        following = places
        for back in range(1, min(LONGEST, last)):
            wanted = recent[last - back]
            if int(wanted) in self._breakers:
                break
            following = following[following >= back]
            following = following[recent[following - back] == wanted]
            if not len(following):
                break
            lengths[following] += 1
        longest: dict[int, int] = {}
        for place in places:
            token = int(recent[place + 1])
            longest[token] = max(longest.get(token, 0), int(lengths[place]))
        for token, length in longest.items():
            if length >= self._allowed and token < len(logits):
                logits[token] -= np.float32(self._multiplier * self._base ** min(length - self._allowed, LONGEST))

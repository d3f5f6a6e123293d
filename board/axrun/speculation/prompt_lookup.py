"""Prompt lookup: the guess is what followed the last tokens at their previous occurrence, in the prompt or the answer.

Saxena, https://github.com/apoorvumang/prompt-lookup-decoding
"""

from __future__ import annotations

from collections.abc import Sequence

from axrun.speculation.guesser import MOST, ROW_STEP, Costs, rows_of

GRAM = 3  # tokens that must have stood together before
LONGEST_PAUSE = 64


class PromptLookup:
    """Guesses what followed the latest previous occurrence of the last `GRAM` tokens.

    After a guess that cost more time than it saved, it skips 1, 2, 4 ... occurrences. After one that was right in
    every token, it guesses more.
    """

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # GRAM tokens -> position behind their latest occurrence
        self._length = ROW_STEP - 1
        self._pause, self._skipped = 0, 0

    def guess(self, ids: Sequence[int], token: int, most: int) -> Sequence[int]:
        self._read([*ids[len(self._ids) :], token])
        place = self._after.get(tuple(self._ids[-GRAM:]))
        if place is None or most < 1:
            return ()
        if self._skipped < self._pause:
            self._skipped += 1
            return ()
        self._skipped = 0
        return self._ids[place : place + min(self._length, most)]

    def learn(self, guessed: int, accepted: int, seconds: float | None) -> None:
        if seconds is not None:
            self._costs.add(guessed, seconds)
        if not guessed:
            return
        if 1 + accepted < self._costs.ratio(guessed):
            self._pause = min(max(2 * self._pause, 1), LONGEST_PAUSE)
        else:
            self._pause //= 2
        longer = accepted == guessed == self._length
        self._length = min(self._length + ROW_STEP if longer else rows_of(accepted) + ROW_STEP - 1, MOST)

    def _read(self, new: Sequence[int]) -> None:
        """Appends tokens, and indexes every position but the end."""
        begun = len(self._ids)
        self._ids += new
        for end in range(max(begun, GRAM), len(self._ids)):
            self._after[tuple(self._ids[end - GRAM : end])] = end

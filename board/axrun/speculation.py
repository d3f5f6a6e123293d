"""Speculative decoding: one engine run verifies several guessed tokens, in little more time than one token takes.

A guess changes the time of an answer, never the answer: every token is chosen from the logits that the tokens before it
give, and a guess only decides which logits the same run computes. That needs an engine whose results do not depend on
how tokens are split into runs (`Session.exact`).

Prompt lookup: the guess is what followed the last tokens at their previous occurrence, in the prompt or the answer.
Saxena, https://github.com/apoorvumang/prompt-lookup-decoding
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from axrun.model import Model

ROW_STEP = 8  # the decoder pads runs to multiples of it, so 7 guesses behind a token cost as much as one
MOST = 4 * ROW_STEP - 1
GRAM = 3  # tokens that must have stood together before
USUAL_COST = 1.5  # of a run of 8 tokens, in runs of one, before it was measured
DECAY = 1.02  # a least time grows by this for each run, since later tokens attend to more rows
LONGEST_PAUSE = 64


class Guesser(Protocol):
    """Guesses for one answer."""

    def guess(self, ids: Sequence[int], token: int, most: int) -> Sequence[int]:
        """At most `most` tokens that may follow `ids` and `token`. `ids` only grow from call to call."""

    def learn(self, guessed: int, accepted: int, seconds: float | None) -> None:
        """A run with `guessed` tokens behind a known one took `seconds`; the first `accepted` of them were right.

        None: other sequences were in the run, so its time says nothing about the guesses.
        """


class Costs:
    """Least seconds of recent runs, by number of guessed tokens; shared by all answers of a model."""

    def __init__(self) -> None:
        self._least: dict[int, float] = {}

    def add(self, guessed: int, seconds: float) -> None:
        rows = _rows(guessed)
        if rows in self._least:
            self._least[rows] = min(self._least[rows] * DECAY, seconds)
        else:  # the first run of a shape binds its memory
            self._least[rows] = self._least.get(1, seconds / USUAL_COST) * (USUAL_COST if guessed else 1)

    def ratio(self, guessed: int) -> float:
        """The time of a run with guesses, in runs of one token."""
        one, many = self._least.get(1), self._least.get(_rows(guessed))
        return many / one if one and many else USUAL_COST


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
        self._length = min(self._length + ROW_STEP if longer else _rows(accepted) + ROW_STEP - 1, MOST)

    def _read(self, new: Sequence[int]) -> None:
        """Appends tokens, and indexes every position but the end."""
        begun = len(self._ids)
        self._ids += new
        for end in range(max(begun, GRAM), len(self._ids)):
            self._after[tuple(self._ids[end - GRAM : end])] = end


def _rows(guessed: int) -> int:
    """The tokens of a run with the known one and guesses behind it, as the decoder pads it."""
    return -(-(1 + guessed) // ROW_STEP) * ROW_STEP if guessed else 1


def prompt_lookup(model: Model, costs: Costs) -> Guesser | None:
    """Prompt lookup for one answer, or None where results depend on how tokens are cut into runs."""
    return PromptLookup(costs) if model.decoder.exact else None

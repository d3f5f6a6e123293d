"""What guesses tokens, and what runs with guesses cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

ROW_STEP = 8  # the decoder pads runs to multiples of it, so 7 guesses behind a token cost as much as one
MOST = 4 * ROW_STEP - 1
USUAL_COST = 1.5  # of a run of 8 tokens, in runs of one, before it was measured
DECAY = 1.02  # a least time grows by this for each run, since later tokens attend to more rows


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
        rows = rows_of(guessed)
        if rows in self._least:
            self._least[rows] = min(self._least[rows] * DECAY, seconds)
        else:  # the first run of a shape binds its memory
            self._least[rows] = self._least.get(1, seconds / USUAL_COST) * (USUAL_COST if guessed else 1)

    @property
    def one(self) -> float:
        """Least seconds of a run of one token; 0 before the first."""
        return self._least.get(1, 0.0)

    def ratio(self, guessed: int) -> float:
        """The time of a run with guesses, in runs of one token."""
        one, many = self._least.get(1), self._least.get(rows_of(guessed))
        return many / one if one and many else USUAL_COST


def rows_of(guessed: int) -> int:
    """The tokens of a run with the known one and guesses behind it, as the decoder pads it."""
    return -(-(1 + guessed) // ROW_STEP) * ROW_STEP if guessed else 1

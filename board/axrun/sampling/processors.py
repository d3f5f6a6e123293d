"""Logits processors: what changes the logits of a token before it is drawn, one after another, in one list.

A new one (a grammar, a bias of another kind) is a class here and a line in `processors`. Temperature, top-k, top-p and
min-p are not among them: `axrun.sampling.draw` applies those together, since they share one sort.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from axrun.sampling import Sampling

Floats = NDArray[np.float32]


class Processor(Protocol):
    """Belongs to one answer, and may keep what it has seen of it."""

    def __call__(self, logits: Floats, ids: Sequence[int], start: int) -> None:
        """Changes logits [vocab] of the token behind `ids` in place; from `start` on `ids` are the answer's."""


def processors(sampling: Sampling) -> list[Processor]:
    """Those that the settings ask for, in the order in which they are applied: OpenAI's first, then transformers'."""
    found: list[Processor] = []
    if sampling.presence_penalty or sampling.frequency_penalty:
        found.append(AnswerPenalty(sampling.presence_penalty, sampling.frequency_penalty))
    if sampling.logit_bias:
        found.append(Bias(sampling.logit_bias))
    if sampling.repetition_penalty != 1:
        found.append(RepetitionPenalty(sampling.repetition_penalty, sampling.penalty_window))
    if sampling.suppress:
        found.append(Suppress(sampling.suppress))
    return found


class AnswerPenalty:
    """Lowers tokens that the answer holds: once by `presence`, and by `frequency` for each time.

    https://platform.openai.com/docs/guides/text-generation#frequency-and-presence-penalties
    """

    def __init__(self, presence: float, frequency: float) -> None:
        self._presence, self._frequency = presence, frequency
        self._counts: Counter[int] = Counter()
        self._counted = 0

    def __call__(self, logits: Floats, ids: Sequence[int], start: int) -> None:
        new = ids[start + self._counted :]
        self._counts.update(new)
        self._counted += len(new)
        if self._counts:
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            logits[np.fromiter(self._counts, np.int64, len(self._counts))] -= counts * self._frequency + self._presence


class Bias:
    """Adds to logits, by token id."""

    def __init__(self, added: Mapping[int, float]) -> None:
        self._ids = np.fromiter(added, np.int64, len(added))
        self._added = np.fromiter(added.values(), np.float32, len(added))

    def __call__(self, logits: Floats, ids: Sequence[int], start: int) -> None:
        logits[self._ids] += self._added


class RepetitionPenalty:
    """Divides the logits of recent tokens by the penalty, or multiplies them where they are negative.

    `window`: how many tokens count as recent, None for all.
    Keskar et al., CTRL, https://arxiv.org/abs/1909.05858, section 4.1, as transformers has it.
    """

    def __init__(self, penalty: float, window: int | None = None) -> None:
        self._penalty, self._window = np.float32(penalty), window

    def __call__(self, logits: Floats, ids: Sequence[int], start: int) -> None:
        window = len(ids) if self._window is None else min(self._window, len(ids))
        if window:
            recent = np.unique(np.asarray(ids[-window:], np.int64))
            seen = logits[recent]
            logits[recent] = np.where(seen < 0, seen * self._penalty, seen / self._penalty)


class Suppress:
    """Rules tokens out; ids beyond the vocabulary are none."""

    def __init__(self, tokens: Collection[int]) -> None:
        self._ids = np.array(sorted(tokens), np.int64)

    def __call__(self, logits: Floats, ids: Sequence[int], start: int) -> None:
        logits[self._ids[self._ids < len(logits)]] = -np.inf

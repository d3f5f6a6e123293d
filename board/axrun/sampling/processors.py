"""Logits processors, applied in order before a token is sampled.

To add one, write a class here and add it to `processors`. Temperature, top-k, top-p and min-p
are not processors: `axrun.sampling.draw` applies them together, since they share one sort.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from axrun.sampling import Sampling
from axrun.sampling.dry import Dry
from axrun.sampling.truncate import TopNSigma, Typical, Xtc

Floats = NDArray[np.float32]


class Processor(Protocol):
    """A processor for one answer; it may keep state between tokens."""

    def __call__(self, logits: Floats, ids: Sequence[int], start: int) -> None:
        """Modifies the logits [vocab] of the token after `ids` in place; ids[start:] are the answer so far."""


def processors(sampling: Sampling, random: np.random.Generator) -> list[Processor]:
    """The processors for these settings, in order.

    Penalties come first: those of OpenAI's API, then transformers', then DRY. What is excluded follows: suppressed
    tokens, what leaves the grammar, and last, where tokens are sampled, what is cut off from the rest.
    """
    found: list[Processor] = []
    if sampling.presence_penalty or sampling.frequency_penalty:
        found.append(AnswerPenalty(sampling.presence_penalty, sampling.frequency_penalty))
    if sampling.logit_bias:
        found.append(Bias(sampling.logit_bias))
    if sampling.repetition_penalty != 1:
        found.append(RepetitionPenalty(sampling.repetition_penalty, sampling.penalty_window))
    if sampling.dry_multiplier:
        found.append(
            Dry(
                sampling.dry_multiplier,
                sampling.dry_base,
                sampling.dry_allowed_length,
                sampling.dry_breakers,
                sampling.dry_window,
            )
        )
    if sampling.suppress:
        found.append(Suppress(sampling.suppress))
    if sampling.budget is not None:
        found.append(sampling.budget)
    if sampling.grammar is not None:
        found.append(sampling.grammar.processor())
    if sampling.temperature and sampling.top_n_sigma:
        found.append(TopNSigma(sampling.top_n_sigma))
    if sampling.temperature and sampling.typical_p < 1:
        found.append(Typical(sampling.typical_p))
    if sampling.temperature and sampling.xtc_probability:
        found.append(Xtc(sampling.xtc_probability, sampling.xtc_threshold, random))
    return found


class AnswerPenalty:
    """Lowers the logits of tokens in the answer: once by `presence`, and by `frequency` per occurrence.

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
    """Adds a bias to logits by token id."""

    def __init__(self, added: Mapping[int, float]) -> None:
        self._ids = np.fromiter(added, np.int64, len(added))
        self._added = np.fromiter(added.values(), np.float32, len(added))

    def __call__(self, logits: Floats, ids: Sequence[int], start: int) -> None:
        logits[self._ids] += self._added


class RepetitionPenalty:
    """Divides positive logits of recent tokens by the penalty, and multiplies negative ones.

    `window`: number of recent tokens, None for all.
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
    """Excludes tokens; ignores ids outside the vocabulary."""

    def __init__(self, tokens: Collection[int]) -> None:
        self._ids = np.array(sorted(tokens), np.int64)

    def __call__(self, logits: Floats, ids: Sequence[int], start: int) -> None:
        logits[self._ids[self._ids < len(logits)]] = -np.inf

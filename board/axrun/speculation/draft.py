"""Speculative decoding with a draft model: a smaller bundle with the same tokenizer guesses, the model verifies.

Leviathan et al., Fast Inference from Transformers via Speculative Decoding, section 3: https://arxiv.org/abs/2211.17192
Here a guess is accepted if it is the token that the model itself chooses, so answers do not change.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from axrun.errors import BadInput, CheckFailed
from axrun.format.bundle import Bundle
from axrun.format.pooling import refuse_text
from axrun.load import DEFAULTS, Loading
from axrun.model import Model
from axrun.sequence import Sequence as TokenSequence
from axrun.speculation.guesser import MOST, Costs, Guesser
from axrun.text.tokenizer import Tokenizer

USUAL = 0.7  # acceptance rate before any guess was verified
MEMORY = 0.9  # weight of the past in the acceptance rate, for each verified token
RETRY = 32  # tokens without a guess before one is tried again


def load(path: Path, bundle: Bundle, loading: Loading = DEFAULTS) -> Model:
    """The draft model for a bundle. Raises BadInput if its tokenizer differs, or as loading a bundle does."""
    draft = loading.open(path)
    refuse_text(draft)
    ours, theirs = (Tokenizer.open(each.hf).vocabulary for each in (bundle, draft))
    if ours != theirs:
        token = next(iter(sorted(ours.items() ^ theirs.items())))[0]
        raise BadInput(
            f"{draft.path} cannot be the draft model of {bundle.path}: their tokenizers differ, first in "
            f"{token!a:.40}\nBuild a smaller model of the same family."
        )
    return loading.load(draft)


class DraftGuesser:
    """Guesses the greedy continuation of the draft model; asks `first` before, whose guesses cost nothing.

    The number of guessed tokens is the one with the least expected time per token, given the acceptance rate so far and
    the measured time of both models. It may be 0. The draft model is not asked while other sequences decode, which it
    would delay.
    """

    def __init__(self, sequence: TokenSequence, vocab_size: int, costs: Costs, first: Guesser | None = None) -> None:
        """`sequence` is one of the draft model; what it holds of the answer's prompt is not computed again.

        `vocab_size` is that of the model: with the same tokenizer, either may have more rows behind the last token.
        """
        self._sequence, self._costs, self._first = sequence, costs, first
        self._vocab = min(vocab_size, sequence.model.post.vocab_size)
        self._rate, self._seconds, self._waited = USUAL, 0.0, 0
        self._asked_first, self._alone = False, True

    def guess(self, ids: Sequence[int], token: int, most: int) -> Sequence[int]:
        found = self._first.guess(ids, token, most) if self._first else ()
        self._asked_first = bool(found)
        if found:
            return found
        count = min(self._count() if self._alone else 0, most, self._sequence.context - len(ids) - 2)
        if count < 1:
            self._waited += 1
            return ()
        self._waited = 0
        try:
            return self._draft([*ids, token], count)
        except CheckFailed:  # the draft model overflows; the answer does not depend on it
            return ()

    def learn(self, guessed: int, accepted: int, seconds: float | None) -> None:
        self._alone = seconds is not None
        if self._first and (self._asked_first or not guessed):
            self._first.learn(guessed, accepted, seconds)
        elif seconds is not None:
            self._costs.add(guessed, seconds - guessed * self._seconds)
        if guessed and not self._asked_first:
            for place in range(min(accepted + 1, guessed)):
                self._rate = MEMORY * self._rate + (1 - MEMORY) * (place < accepted)

    def _draft(self, ids: Sequence[int], count: int) -> list[int]:
        sequence = self._sequence
        sequence.truncate(sequence.reusable(ids))
        new, guess = ids[sequence.length :], list[int]()
        if max(new) >= self._vocab:
            return guess
        started = time.perf_counter()
        while len(guess) < count:
            for hidden in sequence.extend(new):
                last = hidden[-1:]
            if not guess:
                started = time.perf_counter()  # tokens that are new to the draft model are read once
            new = [int(sequence.model.post(last)[0][: self._vocab].argmax())]
            guess += new
        self._seconds = (time.perf_counter() - started) / count
        return guess

    def _count(self) -> int:
        """The number of tokens to guess, with the least expected time per token."""
        if self._waited >= RETRY:
            return 1

        def cost(count: int) -> float:
            expected = sum(self._rate**place for place in range(count + 1))  # tokens of a run, (1) of the paper
            return (self._costs.ratio(count) + count * self._share()) / expected

        return min(range(MOST + 1), key=cost)

    def _share(self) -> float:
        """The time of a draft token, in runs of the model with one token."""
        return self._seconds / self._costs.one if self._costs.one else 0.0

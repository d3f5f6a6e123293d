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
from axrun.sequence import Sequence as TokenSequence
from axrun.speculation.guesser import DECAY, MOST, Costs, Guesser
from axrun.text.tokenizer import Tokenizer

USUAL_RATE = 0.7  # acceptance before any guess was verified
MEMORY = 0.9  # weight of the past in the acceptance rate, for each verified token
PROBE = 3  # tokens of the first guess, which measures the draft model
PAUSE, LONGEST_PAUSE = 32, 1024  # tokens without a guess before one is tried again


def open_for(bundle: Bundle, path: Path, loading: Loading = DEFAULTS) -> Bundle:
    """The bundle of a draft model for `bundle`, not loaded yet.

    Raises BadInput if its tokenizer differs or the engine does not verify guesses exactly, or as opening a bundle does.
    """
    if not loading.engine.startswith("ax"):
        raise BadInput(f"--draft needs the engine ax or ax-int8, which verify guesses exactly; not {loading.engine}")
    draft = loading.open(path)
    refuse_text(draft)
    ours, theirs = (Tokenizer.open(each.hf).vocabulary for each in (bundle, draft))
    if ours != theirs:
        token = next(iter(sorted(ours.items() ^ theirs.items())))[0]
        raise BadInput(
            f"{draft.path} cannot be the draft model of {bundle.path}: their tokenizers differ, first in "
            f"{token!a:.40}\nBuild a smaller model of the same family."
        )
    return draft


class GuessLength:
    """Chooses how many tokens to guess: as many as give the least expected time per token, often none.

    That depends on the acceptance rate and on the time of both models, measured over all answers. While no guess is
    worth its time, single tokens are guessed at growing intervals, in case that changes.
    """

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._rate, self._seconds = USUAL_RATE, 0.0
        self._waited, self._pause = 0, PAUSE

    def choose(self) -> int:
        if not self._costs.one:
            return 0  # a run without guesses has to be measured first
        if not self._seconds:
            return PROBE
        share = self._seconds / self._costs.one

        def cost(count: int) -> float:
            expected = sum(self._rate**place for place in range(count + 1))  # tokens of a run, (1) of the paper
            return (self._costs.ratio(count) + count * share) / expected

        count = min(range(MOST + 1), key=cost)
        if count:
            self._waited, self._pause = 0, PAUSE
        elif self._waited < self._pause:
            self._waited += 1
        else:
            self._waited, self._pause, count = 0, min(2 * self._pause, LONGEST_PAUSE), 1
        return count

    def drafted(self, seconds: float) -> None:
        """The draft model took `seconds` for each token of a guess."""
        self._seconds = min(self._seconds * DECAY, seconds) if self._seconds else seconds

    def verified(self, guessed: int, accepted: int) -> None:
        """The first `accepted` of `guessed` tokens were right."""
        for place in range(min(accepted + 1, guessed)):
            self._rate = MEMORY * self._rate + (1 - MEMORY) * (place < accepted)


class DraftGuesser:
    """Guesses the greedy continuation of the draft model; asks `first` before, whose guesses cost nothing.

    The draft model is not asked while other sequences decode, which it would delay.
    """

    def __init__(
        self,
        sequence: TokenSequence,
        vocab_size: int,
        costs: Costs,
        length: GuessLength,
        first: Guesser | None = None,
    ) -> None:
        """`sequence` is one of the draft model; what it holds of the answer's prompt is not computed again.

        `vocab_size` is that of the model: with the same tokenizer, either may have more rows behind the last token.
        """
        self._sequence, self._costs, self._length, self._first = sequence, costs, length, first
        self._vocab = min(vocab_size, sequence.model.post.vocab_size)
        self._asked_first, self._alone, self._spent = False, True, 0.0

    def guess(self, ids: Sequence[int], token: int, most: int) -> Sequence[int]:
        self._spent = 0.0
        found = self._first.guess(ids, token, most) if self._first else ()
        self._asked_first = bool(found)
        if found or not self._alone:
            return found
        count = min(self._length.choose(), most, self._sequence.context - len(ids) - 2)
        if count < 1:
            return ()
        try:
            return self._draft([*ids, token], count)
        except CheckFailed:  # the draft model overflows; the answer does not depend on it
            return ()

    def learn(self, guessed: int, accepted: int, seconds: float | None) -> None:
        self._alone = seconds is not None
        if self._first and (self._asked_first or not guessed):
            self._first.learn(guessed, accepted, None if seconds is None else seconds - self._spent)
        elif seconds is not None:
            self._costs.add(guessed, seconds - self._spent)
        if guessed and not self._asked_first:
            self._length.verified(guessed, accepted)

    def _draft(self, ids: Sequence[int], count: int) -> list[int]:
        sequence = self._sequence
        sequence.truncate(sequence.reusable(ids))
        new, guess = ids[sequence.length :], list[int]()
        if max(new) >= self._vocab:
            return guess
        reads_prompt = len(new) > MOST + 1  # once in an answer
        begun = started = time.perf_counter()
        while len(guess) < count:
            for hidden in sequence.extend(new):
                last = hidden[-1:]
            if reads_prompt and not guess:
                started = time.perf_counter()
            new = [int(sequence.model.post(last)[0][: self._vocab].argmax())]
            guess += new
        ended = time.perf_counter()
        self._spent = ended - begun
        if not reads_prompt:
            self._length.drafted((ended - started) / count)
        elif count > 1:
            self._length.drafted((ended - started) / (count - 1))
        return guess

"""Speculative decoding: one engine run verifies several guessed tokens, in little more time than one token takes.

A guess changes the time of an answer, never the answer: every token is chosen from the logits that the tokens before it
give, and a guess only decides which logits the same run computes. That needs an engine whose results do not depend on
how tokens are split into runs (`Session.exact`).
"""

from __future__ import annotations

from axrun.format.bundle import Bundle
from axrun.load import Loading
from axrun.model import Model
from axrun.sequence import Sequence
from axrun.speculation.draft import DraftGuesser, GuessLength
from axrun.speculation.guesser import Costs, Guesser
from axrun.speculation.prompt_lookup import PromptLookup


class Speculation:
    """Guesses tokens for the answers of one model: by prompt lookup and, if there is one, by a draft model."""

    def __init__(self, draft: Model | None = None) -> None:
        """All answers share one KV cache of the draft model: it is asked only if a single answer is being generated."""
        self._costs, self._draft = Costs(), None if draft is None else Sequence(draft)
        self._length = GuessLength(self._costs)

    @classmethod
    def load(cls, draft: Bundle | None, loading: Loading) -> Speculation:
        """With a draft model of `open_for`, if it is given. Raises BadInput if memory is too small for it."""
        return cls(None if draft is None else loading.load(draft))

    def guesser(self, sequence: Sequence) -> Guesser | None:
        """For one answer, or None if results depend on how tokens are split into runs."""
        if not sequence.model.decoder.exact:
            return None
        lookup = PromptLookup(self._costs)
        if self._draft is None:
            return lookup
        return DraftGuesser(self._draft, sequence.model.post.vocab_size, self._costs, self._length, lookup)

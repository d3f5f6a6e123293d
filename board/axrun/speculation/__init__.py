"""Speculative decoding: one engine run verifies several guessed tokens, in little more time than one token takes.

A guess changes the time of an answer, never the answer: every token is chosen from the logits that the tokens before it
give, and a guess only decides which logits the same run computes. That needs an engine whose results do not depend on
how tokens are split into runs (`Session.exact`).
"""

from __future__ import annotations

from pathlib import Path

from axrun.errors import BadInput
from axrun.format.bundle import Bundle
from axrun.load import Loading
from axrun.model import Model
from axrun.sequence import Sequence
from axrun.speculation import draft
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
    def load(cls, path: Path | None, bundle: Bundle, loading: Loading) -> Speculation:
        """With the draft model at `path`, if it is given. Raises BadInput as `draft.load` does."""
        if path is None:
            return cls()
        if not loading.engine.startswith("ax"):
            raise BadInput(
                f"--draft needs the engine ax or ax-int8, which verify guesses exactly; not {loading.engine}"
            )
        return cls(draft.load(path, bundle, loading))

    def guesser(self, sequence: Sequence) -> Guesser | None:
        """For one answer, or None if results depend on how tokens are split into runs."""
        if not sequence.model.decoder.exact:
            return None
        lookup = PromptLookup(self._costs)
        if self._draft is None:
            return lookup
        return DraftGuesser(self._draft, sequence.model.post.vocab_size, self._costs, self._length, lookup)

"""A sequence: token ids and their K/V in a model's cache. What a prompt has in common with it is not computed again.

What is reused is the longest beginning that the sequence and a prompt share, so that a further turn of a conversation
costs what is new in it. Rows of K/V that were computed in other chunks may differ in their last bits, and once in a
long while so does a token. Where answers must not depend on what happened to be in the cache, an `exact` sequence
reuses only what a run from the start would compute in the very same chunks: whole prefill chunks, from the beginning
on.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Iterator
from typing import Any

from numpy.typing import NDArray

from axrun.decoder import Chunk
from axrun.model import Logits, Model

Array = NDArray[Any]


class Sequence:
    """`ids` are the tokens in the cache of `model`, which is the sequence's own and empty to begin with."""

    def __init__(self, model: Model, exact: bool = False) -> None:
        self.model = model
        self.ids: list[int] = []
        self._wants_exact = exact
        self._exact = 0  # tokens from the start on whose rows any run would have computed alike
        model.decoder.cache.reset()

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return len(self.ids)

    @property
    def context(self) -> int:
        """Tokens that fit."""
        return self.model.context

    def common(self, ids: abc.Sequence[int]) -> int:
        """How many tokens its own begin with, too."""
        return common_prefix(ids, self.ids)

    def reusable(self, ids: abc.Sequence[int]) -> int:
        """How many of the tokens need not be computed again; never all, for the last one's logits are wanted."""
        common = self.common(ids)
        if not self._wants_exact:
            return max(min(common, len(ids) - 1), 0)
        reused = 0
        for chunk in self.model.decoder.chunks(0, len(ids)):
            end = chunk.position + chunk.count
            if end > min(common, self._exact) or end == len(ids):
                break
            reused = end
        return reused

    def truncate(self, length: int) -> None:
        """Forgets the tokens from `length` on."""
        del self.ids[length:]  # first: an interrupt here must not leave tokens whose rows are gone
        self._exact = min(self._exact, len(self.ids))
        cache = self.model.decoder.cache
        cache.truncate(min(len(self.ids), cache.length))

    def reset(self) -> None:
        """Forgets everything, and whatever a step that failed has left."""
        self.ids, self._exact = [], 0
        cache = self.model.decoder.cache
        cache.length = cache.keys[0].shape[1]
        cache.reset()

    def extend(self, ids: abc.Sequence[int]) -> Iterator[Array]:
        """Hidden states [n, H] of further tokens, chunk by chunk; the next overwrites them.

        Raises BadInput when the tokens are none or do not fit the context, CheckFailed when a layer gives what is not
        finite. However it ends, the sequence holds the tokens whose rows are computed.
        """
        start = len(self.ids)
        for chunk, hidden in self.model.hidden(ids, start):
            if chunk.position == self._exact and chunk.count == self._whole(chunk):
                self._exact += chunk.count
            self.ids += ids[chunk.position - start : chunk.position - start + chunk.count]
            yield hidden

    def score(self, ids: abc.Sequence[int]) -> Iterator[Logits]:
        """float32 logits after each of further tokens, a few rows [n, vocab] at a time; the next overwrite them."""
        for hidden in self.extend(ids):
            yield from self.model.logits(hidden)

    def _whole(self, chunk: Chunk) -> int:
        """Tokens of the chunk at the same place in an endless prompt."""
        return next(self.model.decoder.chunks(chunk.position, self.context - chunk.position)).count


def common_prefix(one: abc.Sequence[int], other: abc.Sequence[int]) -> int:
    """How many tokens both begin with."""
    one, other = list(one), list(other)
    least, most = 0, min(len(one), len(other))
    while least < most:  # halves are compared in C
        middle = (least + most + 1) // 2
        if one[least:middle] == other[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least

"""K/V slots: what was computed for one request serves the next that begins alike.

What is reused is the longest beginning that a slot and a prompt have in common, so that a further turn of a
conversation costs what is new in it. Rows of K/V that were computed in other chunks differ in their last bits, and once
in a long while so does a token. Where answers must not depend on what happened to be in a slot, an `exact` one reuses
only what a run from the start would compute in the very same chunks: whole prefill chunks, from the beginning on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from numpy.typing import NDArray

from axrun.decoder import Chunk, Decoder
from axrun.errors import BadInput
from axrun.free_memory import available
from axrun.kv_cache import common_prefix
from axrun.memory import Allow, refuse

Array = NDArray[Any]
Embed = Callable[[Sequence[int]], Array]

SPARE = 64 << 20  # bytes of memory that slots leave to everything else


class Slot:
    """The K/V of one sequence. `used` is when it was last taken, in whatever the scheduler counts."""

    def __init__(self, decoder: Decoder, embed: Embed, exact: bool = False) -> None:
        self._decoder, self._embed, self._wants_exact = decoder, embed, exact
        self._tokens: list[int] = []
        self._exact = 0  # tokens from the start on whose rows any run would have computed alike
        self.used = 0

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return len(self._tokens)

    @property
    def context(self) -> int:
        """Tokens that fit."""
        return self._decoder.context

    def common(self, ids: Sequence[int]) -> int:
        """How many tokens its own begin with, too."""
        return common_prefix(ids, self._tokens)

    def reusable(self, ids: Sequence[int]) -> int:
        """How many of the tokens need not be computed again; never all, for the last one's logits are wanted."""
        common = self.common(ids)
        if not self._wants_exact:
            return min(common, len(ids) - 1)
        reused = 0
        for chunk in self._decoder.chunks(0, len(ids)):
            end = chunk.position + chunk.count
            if end > min(common, self._exact) or end == len(ids):
                break
            reused = end
        return reused

    def start(self, ids: Sequence[int], reuse: int) -> Iterator[Array]:
        """Hidden states of `ids` from number `reuse` on, chunk by chunk; the next overwrites them.

        The first `reuse` tokens are those the slot has. Raises BadInput when they do not fit the context.
        """
        self._exact = min(self._exact, reuse)
        del self._tokens[reuse:]
        return self._run(ids[reuse:])

    def follow(self, token: int) -> Array:
        """The hidden state [1, H] of one more token."""
        (hidden,) = self._run([token])
        return hidden

    def reset(self) -> None:
        """Forgets everything, and whatever a step that failed has left."""
        self._tokens, self._exact = [], 0
        cache = self._decoder.cache
        cache.length = cache.keys[0].shape[1]
        cache.reset()

    def _run(self, ids: Sequence[int]) -> Iterator[Array]:
        start = self.length
        for chunk, hidden in self._decoder.run(self._embed(ids), start):
            if chunk.position == self._exact and chunk.count == self._whole(chunk):
                self._exact += chunk.count
            self._tokens += ids[chunk.position - start : chunk.position - start + chunk.count]
            yield hidden

    def _whole(self, chunk: Chunk) -> int:
        """Tokens of the chunk at the same place in an endless prompt."""
        return next(self._decoder.chunks(chunk.position, self.context - chunk.position)).count


def allocate(first: Decoder, count: int, embed: Embed, allow: Allow = refuse, exact: bool = False) -> list[Slot]:
    """`count` slots that share the layers of a decoder, which is the first one's.

    Raises BadInput when their K/V does not fit the memory that is left, and `allow`, asked with the numbers, says no.
    """
    each, left = first.cache.nbytes, available()
    needed = (count - 1) * each
    if left is not None and needed + SPARE > left:
        shortage = f"{count} slots need {needed >> 20} MB more for their K/V, {left >> 20} MB of memory are left"
        if not allow(shortage):
            fitting = 1 + max(left - SPARE, 0) // each
            raise BadInput(f"{shortage}\nStart with --slots {fitting}; --force tries it.")
    decoders = [first, *(Decoder(first.sessions) for _ in range(count - 1))]
    return [Slot(decoder, embed, exact) for decoder in decoders]

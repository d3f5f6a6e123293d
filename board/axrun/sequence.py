"""A sequence of token ids with its KV cache, which reuses the prefix that it shares with the next prompt.

A further turn of a conversation therefore costs only its new tokens. Our engine computes the same bits for a token in
any chunk, so reuse never changes an answer. With onnxruntime and the vendor's engine, rows that were computed in other
chunks may differ in their last bits, which can rarely change a token.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Iterator
from typing import Any

from numpy.typing import NDArray

from axrun.model import Logits, Model

Array = NDArray[Any]


class Sequence:
    """`ids` are the tokens in the cache of `model`, which the sequence owns and which must be empty at first."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.ids: list[int] = []
        model.decoder.cache.reset()

    @property
    def length(self) -> int:
        """Number of tokens in the cache."""
        return len(self.ids)

    @property
    def context(self) -> int:
        """Maximum number of tokens."""
        return self.model.context

    def common(self, ids: abc.Sequence[int]) -> int:
        """Length of the prefix shared with `ids`."""
        return common_prefix(ids, self.ids)

    def reusable(self, ids: abc.Sequence[int]) -> int:
        """Number of tokens that need not be computed again; never all, since the logits of the last one are needed."""
        return max(min(self.common(ids), len(ids) - 1), 0)

    def truncate(self, length: int) -> None:
        """Drops the tokens from `length` on."""
        del self.ids[length:]  # first, so that an interrupt cannot leave tokens without rows
        cache = self.model.decoder.cache
        cache.truncate(min(len(self.ids), cache.length))

    def restore(self, ids: abc.Sequence[int], position: int, rows: bytes) -> None:
        """Puts tokens and their rows of the KV cache at `position`, and drops what is behind them."""
        self.truncate(position)
        self.model.decoder.cache.restore(position, len(ids), rows)
        self.ids += ids

    def reset(self) -> None:
        """Drops all tokens, and clears rows that a failed step left."""
        self.ids = []
        self.clear()

    def extend(self, ids: abc.Sequence[int]) -> Iterator[Array]:
        """Appends tokens; yields their hidden states [n, H] by chunk, each overwriting the previous ones.

        Raises BadInput for no tokens or more than fit the context, CheckFailed if a layer returns values that are not
        finite. Even then, the sequence holds exactly the tokens whose rows are complete.
        """
        start = len(self.ids)
        for chunk, hidden in self.model.hidden(ids, start):
            self.ids += ids[chunk.position - start : chunk.position - start + chunk.count]
            yield hidden

    def score(self, ids: abc.Sequence[int]) -> Iterator[Logits]:
        """Appends tokens; yields float32 logits after each, a few rows [n, vocab] at a time (reused buffer)."""
        for hidden in self.extend(ids):
            yield from self.model.logits(hidden)

    def clear(self) -> None:
        """Clears all rows behind the tokens, also those that a failed step left."""
        self.model.decoder.cache.keep(len(self.ids))


def common_prefix(one: abc.Sequence[int], other: abc.Sequence[int]) -> int:
    """Length of the common prefix."""
    one, other = list(one), list(other)
    least, most = 0, min(len(one), len(other))
    while least < most:  # binary search: slices are compared in C
        middle = (least + most + 1) // 2
        if one[least:middle] == other[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least

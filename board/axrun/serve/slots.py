"""KV slots: sequences that share the layers of one model, so that several answers can be generated concurrently.

The KV cache of a finished request is reused by a later one with the same prefix. With our engine the caches take blocks
of one pool as they grow; otherwise each has memory for a whole context.
"""

from __future__ import annotations

import contextlib
from collections import abc
from collections.abc import Callable

from axrun.errors import BadInput, Failure
from axrun.free_memory import available
from axrun.kv_pool import Pool, PooledCache, pool_of
from axrun.memory import Allow, refuse
from axrun.model import Model
from axrun.sequence import Sequence

SPARE = 64 << 20  # bytes of memory to leave free
FORCE = "--force tries anyway."


class Slot(Sequence):
    """A sequence that serves one request at a time. `used` is the scheduler's counter at its last assignment.

    The cache may hold only the first `held` of its tokens, if the others have to be computed again.
    """

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.used = 0

    @property
    def pool(self) -> Pool | None:
        """Where its blocks are from, if it has any."""
        cache = self.model.decoder.cache
        return cache.pool if isinstance(cache, PooledCache) else None

    @property
    def blocks(self) -> abc.Sequence[int]:
        cache = self.model.decoder.cache
        return cache.blocks if isinstance(cache, PooledCache) else ()

    @property
    def held(self) -> int:
        """Number of tokens whose rows are in the cache."""
        return min(len(self.ids), self.model.decoder.cache.length)

    def suspend(self) -> None:
        """Gives its blocks back, and keeps its ids."""
        self.model.decoder.cache.reset()

    def settle(self) -> None:
        """Drops the ids without rows."""
        if self.held < self.length:
            self.truncate(self.held)

    def lost(self) -> Sequence:
        """The sequence of the tokens that it holds, for a job that computes the others again."""
        return _Held(self)

    def take(self, other: Slot, ids: abc.Sequence[int], count: int) -> None:
        """Takes rows of `ids` from another slot that holds the first `count`, as far as there is room.

        The slot holds the first tokens of `ids`, all that it has unless it has lost rows.
        """
        mine, others = self.model.decoder.cache, other.model.decoder.cache
        assert isinstance(mine, PooledCache)
        assert isinstance(others, PooledCache)
        lost = self.held < self.length
        with contextlib.suppress(Failure):  # what it could not take is computed
            mine.adopt(others, self.held, count)
        if not lost:
            self.ids = list(ids[: mine.length])


class _Held(Sequence):
    def __init__(self, slot: Slot) -> None:
        self.model, self.ids = slot.model, slot.ids[: slot.held]


def allocate(
    first: Model,
    count: int,
    allow: Allow = refuse,
    limit: int | None = None,
    say: Callable[[str], None] = lambda line: None,
    held: int = 0,
) -> list[Slot]:
    """Creates `count` slots of a model; without a pool, the first one uses the model's own cache.

    `limit`: bytes of the pool; None: enough for all slots, or what is free. `say` receives a remark in that case.
    `held`: bytes of the free memory that must stay free. Raises BadInput if a whole context does not fit into the
    limit, or the caches into the free memory and `allow(message)` returns False.
    """
    left = available()
    left = None if left is None else max(left - held, 0)
    spare = None if left is None else max(left - SPARE, 0)
    pool = pool_of(first.decoder, count, limit)
    if pool is None:
        if limit is not None:
            say("note: --kv-cache-mb has no effect: each slot has memory of its own with this engine or system")
        _expect(count, first.decoder.cache.nbytes, left, allow)
        return [Slot(model) for model in (first, *(first.another() for _ in range(count - 1)))]
    whole = pool.most * pool.block_bytes  # of a context
    if pool.nbytes < whole:
        raise BadInput(
            f"--kv-cache-mb is {(limit or 0) >> 20}, a context of {first.context} tokens needs {_mb(whole)} MB\n"
            "Give more, or build the bundle with a smaller --kv_cache_len."
        )
    if spare is not None and pool.nbytes > spare:
        free = f"{(left or 0) >> 20} MB of memory are free"
        if limit is not None:
            if not allow(message := f"--kv-cache-mb is {limit >> 20}, {free}"):
                raise BadInput(f"{message}\nGive less; {FORCE}")
        else:
            needed = f"a context of {first.context} tokens needs {_mb(whole)} MB for keys and values, {free}"
            if spare < whole and not allow(needed):
                raise BadInput(f"{needed}\nStop other programs or build with a smaller --kv_cache_len; {FORCE}")
            pool = pool_of(first.decoder, count, max(spare, whole))
            assert pool is not None
            say(
                f"note: {pool.count * pool.tokens} tokens of keys and values fit into the free memory, "
                f"fewer than {count} slots of {first.context}"
            )
    return [Slot(first.another(pool.cache())) for _ in range(count)]


def _expect(count: int, each: int, left: int | None, allow: Allow) -> None:
    """Raises BadInput if the caches of slots do not fit into the free memory; that of the first one exists."""
    needed = (count - 1) * each
    if left is None or needed + SPARE <= left:
        return
    shortage = f"{count} slots need {needed >> 20} MB more for their KV caches, {left >> 20} MB of memory are free"
    if not allow(shortage):
        fitting = 1 + max(left - SPARE, 0) // each
        raise BadInput(f"{shortage}\nStart with --slots {fitting}; {FORCE}")


def _mb(size: int) -> int:
    return -(-size >> 20)

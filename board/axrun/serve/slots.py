"""KV slots: sequences that share the layers of one model, so that several answers can be generated concurrently.

The KV cache of a finished request is reused by a later one with the same prefix. With our engine the caches take blocks
of one pool as they grow; otherwise each has memory for a whole context.
"""

from __future__ import annotations

from axrun.errors import BadInput
from axrun.free_memory import available
from axrun.kv_pool import Pool, PooledCache, pool_of
from axrun.memory import Allow, refuse
from axrun.model import Model
from axrun.sequence import Sequence

SPARE = 64 << 20  # bytes of memory to leave free


class Slot(Sequence):
    """A sequence that serves one request at a time. `used` is the scheduler's counter at its last assignment."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.used = 0

    @property
    def pool(self) -> Pool | None:
        """Where its blocks are from, if it has any."""
        cache = self.model.decoder.cache
        return cache.pool if isinstance(cache, PooledCache) else None


def allocate(first: Model, count: int, allow: Allow = refuse) -> list[Slot]:
    """Creates `count` slots of a model; without a pool, the first one uses the model's own cache.

    Raises BadInput if their KV caches do not fit into the free memory and `allow(message)` returns False.
    """
    pool = pool_of(first.decoder, count, count)
    if pool is None:
        caches, each = [first.decoder.cache], first.decoder.cache.nbytes
    else:
        caches, each = [], pool.most * pool.block_bytes
    left, needed = available(), (count - len(caches)) * each
    if left is not None and needed + SPARE > left:
        shortage = f"{count} slots need {needed >> 20} MB more for their KV caches, {left >> 20} MB of memory are free"
        if not allow(shortage):
            fitting = max(len(caches) + max(left - SPARE, 0) // each, 1)
            raise BadInput(f"{shortage}\nStart with --slots {fitting}; --force tries anyway.")
    if pool is None:
        return [Slot(model) for model in (first, *(first.another() for _ in range(count - 1)))]
    return [Slot(first.another(pool.cache())) for _ in range(count)]

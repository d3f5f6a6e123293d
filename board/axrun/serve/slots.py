"""KV slots: sequences that share the layers of one model, so that several answers can be generated concurrently.

The KV cache of a finished request is reused by a later one with the same prefix.
"""

from __future__ import annotations

from axrun.errors import BadInput
from axrun.free_memory import available
from axrun.memory import Allow, refuse
from axrun.model import Model
from axrun.sequence import Sequence

SPARE = 64 << 20  # bytes of memory to leave free


class Slot(Sequence):
    """A sequence that serves one request at a time. `used` is the scheduler's counter at its last assignment."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.used = 0


def allocate(first: Model, count: int, allow: Allow = refuse) -> list[Slot]:
    """Creates `count` slots of a model; the first one uses the model's own cache.

    Raises BadInput if their KV caches do not fit into the free memory and `allow(message)` returns False.
    """
    each, left = first.decoder.cache.nbytes, available()
    needed = (count - 1) * each
    if left is not None and needed + SPARE > left:
        shortage = f"{count} slots need {needed >> 20} MB more for their KV caches, {left >> 20} MB of memory are free"
        if not allow(shortage):
            fitting = 1 + max(left - SPARE, 0) // each
            raise BadInput(f"{shortage}\nStart with --slots {fitting}; --force tries anyway.")
    return [Slot(model) for model in (first, *(first.another() for _ in range(count - 1)))]

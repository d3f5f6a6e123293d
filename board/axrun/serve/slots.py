"""K/V slots: sequences that share the layers of one model, so that several answers are written at a time.

What was computed for one request serves the next that begins alike.
"""

from __future__ import annotations

from axrun.errors import BadInput
from axrun.free_memory import available
from axrun.memory import Allow, refuse
from axrun.model import Model
from axrun.sequence import Sequence

SPARE = 64 << 20  # bytes of memory that slots leave to everything else


class Slot(Sequence):
    """A sequence that requests take turns in. `used` is when it was last taken, in whatever the scheduler counts."""

    def __init__(self, model: Model, exact: bool = False) -> None:
        super().__init__(model, exact)
        self.used = 0


def allocate(first: Model, count: int, allow: Allow = refuse, exact: bool = False) -> list[Slot]:
    """`count` slots of a model, whose own cache is the first one's.

    Raises BadInput when their K/V does not fit the memory that is left, and `allow`, asked with the numbers, says no.
    """
    each, left = first.decoder.cache.nbytes, available()
    needed = (count - 1) * each
    if left is not None and needed + SPARE > left:
        shortage = f"{count} slots need {needed >> 20} MB more for their K/V, {left >> 20} MB of memory are left"
        if not allow(shortage):
            fitting = 1 + max(left - SPARE, 0) // each
            raise BadInput(f"{shortage}\nStart with --slots {fitting}; --force tries it.")
    return [Slot(model, exact) for model in (first, *(first.another() for _ in range(count - 1)))]

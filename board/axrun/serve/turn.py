"""Requests of a scheduler, and the answers that are being generated for them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Union

from axrun.job import Job
from axrun.serve.errors import ApiError
from axrun.serve.order import Choice, Text
from axrun.serve.slots import Slot
from axrun.serve.writer import Piece, Writing

Task = Union[Choice, Text]
Event = Union[Piece, ApiError, None]


@dataclass(eq=False)
class Ticket:
    """A queued or running request. `deliver` receives its pieces and then None, or an ApiError as the last event.

    `deliver` is called in the scheduler's thread. Times are those of time.monotonic().
    """

    choices: deque[Task]
    deliver: Callable[[Event], None]
    deadline: float
    came: float = field(default_factory=time.monotonic)
    begun: bool = False
    cancelled: bool = False


@dataclass(eq=False)
class Turn:
    """A choice that is being generated in a slot.

    `job` is what it needs next; None: it has not begun. `follows`: another turn, and the number of tokens of a common
    prefix that it is reading.
    """

    ticket: Ticket
    choice: Task
    slot: Slot
    steps: Writing
    job: Job | None = None
    follows: tuple[Turn, int] | None = None

    @property
    def target(self) -> Sequence[int]:
        """Tokens that its slot holds or is about to hold."""
        return max(self.choice.ids, self.slot.ids, key=len) if self.job else self.choice.ids

    @property
    def lost(self) -> bool:
        """Whether tokens have to be computed again before it can go on."""
        return self.slot.held < self.slot.length

    @property
    def work(self) -> Job | None:
        """Its job, or one that computes again what was lost."""
        if not self.lost:
            return self.job
        rest = self.slot.ids[self.slot.held :]
        return Job(self.slot.lost(), rest, len(rest))

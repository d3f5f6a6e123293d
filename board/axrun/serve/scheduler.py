"""Scheduling: a bounded FIFO queue, and one thread that runs an engine step for each busy slot, round-robin."""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Union

from axrun.errors import Failure
from axrun.serve.errors import ApiError
from axrun.serve.metrics import Metrics
from axrun.serve.order import Choice, Text
from axrun.serve.slots import Slot
from axrun.serve.writer import Piece

LOADING, READY, STOPPING = "loading", "ok", "stopping"
LONGEST_RETRY = 60  # seconds

Task = Union[Choice, Text]
Write = Callable[[Task, Slot], Iterator[Union[Piece, None]]]
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
class _Turn:
    """A choice that is being generated in a slot."""

    ticket: Ticket
    slot: Slot
    steps: Iterator[Piece | None]


class Scheduler(threading.Thread):
    """The scheduler thread. `load` is called in it, and returns the slots and the function that generates a choice.

    `failure` is the exception that ended the thread, if any.
    """

    def __init__(
        self,
        load: Callable[[], tuple[Sequence[Slot], Write]],
        limit: int,
        metrics: Metrics,
        ended: Callable[[], None],
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        """`limit` is the queue length. `ready` is called once requests are accepted, `ended` when the thread ends."""
        super().__init__(name="scheduler", daemon=True)
        self._load, self._limit, self._metrics, self._ended, self._ready = load, limit, metrics, ended, ready
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._turns: list[_Turn] = []
        self._slots: Sequence[Slot] = ()
        self._takes = 0
        self._pace = 1.0  # running mean of the seconds a request takes
        self._stop_at = math.inf
        self.state = LOADING
        self.failure: BaseException | None = None

    @property
    def load_figures(self) -> dict[str, int]:
        """The numbers of slots, busy slots and queued requests."""
        return {"slots": len(self._slots), "busy": len(self._turns), "waiting": len(self._waiting)}

    def submit(self, ticket: Ticket) -> None:
        """Adds a request to the queue.

        Raises ApiError: 503 while loading or stopping, 429 if the queue is full.
        """
        with self._changed:
            if self.state != READY:
                raise _unavailable(self.state)
            if len(self._waiting) >= self._limit:
                seconds = self._pace * (1 + len(self._waiting) / max(len(self._slots), 1))
                raise ApiError(
                    429,
                    f"{len(self._waiting)} requests are already queued; try again later.",
                    "rate_limit_exceeded",
                    retry_after=min(max(math.ceil(seconds), 1), LONGEST_RETRY),
                )
            self._waiting.append(ticket)
            self._changed.notify()

    def cancel(self, ticket: Ticket) -> None:
        """Removes a request from the queue now, or from its slot before the next step."""
        with self._changed:
            ticket.cancelled = True
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                self._metrics.cancelled()

    def stop(self, grace: float) -> None:
        """Refuses new and queued requests; running ones have `grace` seconds to finish."""
        with self._changed:
            self.state, self._stop_at = STOPPING, time.monotonic() + grace
            for ticket in self._waiting:
                ticket.deliver(_unavailable(STOPPING))
            self._waiting.clear()
            self._changed.notify()

    def run(self) -> None:
        try:
            self._slots, self._write = self._load()
            self._metrics.watch(lambda: self.load_figures)
            with self._changed:
                if self.state == LOADING:
                    self.state = READY
            if self.state == READY:
                self._ready()
            while self._turns or self.state == READY:
                self._round()
        except BaseException as error:
            self.failure = error
        finally:
            self._ended()

    def _round(self) -> None:
        """Runs one step for each busy slot."""
        with self._changed:
            while not self._turns and not self._waiting and self.state == READY:
                self._changed.wait()
            now = time.monotonic()
            for ticket in [ticket for ticket in self._waiting if now > ticket.deadline]:
                self._waiting.remove(ticket)
                ticket.deliver(_late())
            self._admit()
        for turn in list(self._turns):
            self._step(turn)

    def _admit(self) -> None:
        free = [slot for slot in self._slots if all(turn.slot is not slot for turn in self._turns)]
        while free and self._waiting:
            ticket = self._waiting.popleft()
            choice = ticket.choices.popleft()
            slot = _best(free, choice)
            free.remove(slot)
            self._takes += 1
            slot.used = self._takes
            self._turns.append(_Turn(ticket, slot, self._write(choice, slot)))

    def _step(self, turn: _Turn) -> None:
        ticket, now = turn.ticket, time.monotonic()
        if ticket.cancelled:
            self._release(turn)
            self._metrics.cancelled()
        elif now > min(ticket.deadline, self._stop_at):
            self._release(turn)
            ticket.deliver(_late() if now > ticket.deadline else _unavailable(STOPPING))
        else:
            try:
                piece = next(turn.steps)
            except Exception as error:
                turn.slot.reset()
                self._release(turn)
                ticket.deliver(_failed(error))
                return
            took = time.monotonic() - now
            self._metrics.step(took, piece)
            if piece is not None:
                self._deliver(turn, piece)

    def _deliver(self, turn: _Turn, piece: Piece) -> None:
        ticket = turn.ticket
        if not ticket.begun:
            ticket.begun = True
            self._metrics.first_token(time.monotonic() - ticket.came)
        ticket.deliver(piece)
        if not piece.finish:
            return
        self._metrics.choice(piece)
        self._release(turn)
        if not ticket.choices:
            self._pace += 0.2 * (time.monotonic() - ticket.came - self._pace)
            ticket.deliver(None)
        elif self.state == STOPPING:
            ticket.deliver(_unavailable(STOPPING))
        else:  # back of the queue: other requests go first
            with self._changed:
                if not ticket.cancelled:
                    self._waiting.append(ticket)

    def _release(self, turn: _Turn) -> None:
        self._turns.remove(turn)


def _best(free: Sequence[Slot], choice: Task) -> Slot:
    """The slot that shares the longest prefix with the prompt, else the least recently used one.

    A prefix counts only if it covers 7/8 of the shorter of the two. All chats share the beginning of the template, and
    such a short match must not evict the cache of another chat.
    """

    def match(slot: Slot) -> int:
        common, whole = slot.common(choice.ids), min(len(choice.ids), slot.length)
        return 0 if choice.scores_prompt or 8 * common < 7 * whole else common

    return max(free, key=lambda slot: (match(slot), -slot.used))


def _unavailable(state: str) -> ApiError:
    what = {LOADING: "The model is still being loaded", STOPPING: "The server is shutting down"}[state]
    return ApiError(503, f"{what}; try again later.", "service_unavailable", retry_after=2)


def _late() -> ApiError:
    return ApiError(504, "The answer was not finished within the server's time limit.", "timeout")


def _failed(error: Exception) -> ApiError:
    if not isinstance(error, Failure):
        traceback.print_exception(type(error), error, error.__traceback__)
        return ApiError(500, "Internal error; see the server log.", "internal_error")
    return ApiError(500, str(error), "model_failed")

"""Who may write when: a bounded queue, first come first served, and one thread that gives every slot a step in turn."""

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
from axrun.serve.order import Choice
from axrun.serve.slots import Slot
from axrun.serve.writer import Piece

LOADING, READY, STOPPING = "loading", "ok", "stopping"
LONGEST_RETRY = 60  # seconds

Write = Callable[[Choice, Slot], Iterator[Union[Piece, None]]]
Event = Union[Piece, ApiError, None]


@dataclass(eq=False)
class Ticket:
    """A request on its way. `deliver` gets its pieces, then None; or an ApiError, and nothing after it.

    It is called in the scheduler's thread. Times are of time.monotonic().
    """

    choices: deque[Choice]
    deliver: Callable[[Event], None]
    deadline: float
    came: float = field(default_factory=time.monotonic)
    begun: bool = False
    cancelled: bool = False


@dataclass(eq=False)
class _Turn:
    """A choice that is being written in a slot."""

    ticket: Ticket
    slot: Slot
    steps: Iterator[Piece | None]


class Scheduler(threading.Thread):
    """`load` is called in the thread: the slots, and what writes a choice into one.

    `failure` is what it ended with when it could not load.
    """

    def __init__(
        self,
        load: Callable[[], tuple[Sequence[Slot], Write]],
        limit: int,
        metrics: Metrics,
        ended: Callable[[], None],
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        """`limit` requests may wait. `ready` is called when requests are taken, `ended` when the thread is done."""
        super().__init__(name="scheduler", daemon=True)
        self._load, self._limit, self._metrics, self._ended, self._ready = load, limit, metrics, ended, ready
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._turns: list[_Turn] = []
        self._slots: Sequence[Slot] = ()
        self._takes = 0
        self._pace = 1.0  # seconds a request keeps its slot, a running mean
        self._stop_at = math.inf
        self.state = LOADING
        self.failure: BaseException | None = None

    @property
    def load_figures(self) -> dict[str, int]:
        """How many slots there are, are writing, and how many requests wait."""
        return {"slots": len(self._slots), "busy": len(self._turns), "waiting": len(self._waiting)}

    def submit(self, ticket: Ticket) -> None:
        """Puts it at the end of the queue.

        Raises ApiError: 503 while loading or stopping, 429 when the queue is full.
        """
        with self._changed:
            if self.state != READY:
                raise _unavailable(self.state)
            if len(self._waiting) >= self._limit:
                seconds = self._pace * (1 + len(self._waiting) / max(len(self._slots), 1))
                raise ApiError(
                    429,
                    f"{len(self._waiting)} requests are waiting already; try again later.",
                    "rate_limit_exceeded",
                    retry_after=min(max(math.ceil(seconds), 1), LONGEST_RETRY),
                )
            self._waiting.append(ticket)
            self._changed.notify()

    def cancel(self, ticket: Ticket) -> None:
        """Nobody reads it any more: it leaves the queue now, or its slot before the next step."""
        with self._changed:
            ticket.cancelled = True
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                self._metrics.cancelled()

    def stop(self, grace: float) -> None:
        """No new requests, those that wait are refused, and those that write have `grace` seconds to end."""
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
        """One step for each slot that is taken."""
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
        else:  # the others first
            with self._changed:
                if not ticket.cancelled:
                    self._waiting.append(ticket)

    def _release(self, turn: _Turn) -> None:
        self._turns.remove(turn)


def _best(free: Sequence[Slot], choice: Choice) -> Slot:
    """The slot whose tokens are the beginning of the prompt, or the prompt of them; else the one idle for longest.

    An eighth may be different, no more: every chat begins as its template does, and is not to push out another.
    """

    def match(slot: Slot) -> int:
        common, whole = slot.common(choice.ids), min(len(choice.ids), slot.length)
        return 0 if choice.scores_prompt or 8 * common < 7 * whole else common

    return max(free, key=lambda slot: (match(slot), -slot.used))


def _unavailable(state: str) -> ApiError:
    what = {LOADING: "The model is still being loaded", STOPPING: "The server is shutting down"}[state]
    return ApiError(503, f"{what}; try again later.", "service_unavailable", retry_after=2)


def _late() -> ApiError:
    return ApiError(504, "The request took longer than the server's time limit.", "timeout")


def _failed(error: Exception) -> ApiError:
    if not isinstance(error, Failure):
        traceback.print_exception(type(error), error, error.__traceback__)
        return ApiError(500, "The server failed on this request; its log has the reason.", "internal_error")
    return ApiError(500, str(error), "model_failed")

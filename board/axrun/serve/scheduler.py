"""Scheduling: a bounded FIFO queue, and one thread that runs the engine for all busy slots.

With our engine, a run computes the next tokens of all answers and some of the prompts that are being read. Engines that
run one sequence at a time take turns.
"""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence

from axrun.batch import Batch
from axrun.errors import Failure
from axrun.job import Computed, Job, compute
from axrun.serve.errors import ApiError
from axrun.serve.metrics import Metrics
from axrun.serve.pace import GUESS_ROWS, Pace
from axrun.serve.room import Room
from axrun.serve.slots import Slot
from axrun.serve.turn import Task, Ticket, Turn
from axrun.serve.writer import Piece, Writing

LOADING, READY, STOPPING = "loading", "ok", "stopping"
LONGEST_RETRY = 60  # seconds
SLOWDOWN = 2.5  # of the next tokens of answers, while prompts are read

Write = Callable[[Task, Slot], Writing]


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
        slowdown: float = SLOWDOWN,
    ) -> None:
        """`limit`: how many requests may wait beyond the number of slots. `ended` is called when the thread ends.

        `ready` is called once requests are accepted. `slowdown`: see `Pace`.
        """
        super().__init__(name="scheduler", daemon=True)
        self._load, self._limit, self._metrics, self._ended, self._ready = load, limit, metrics, ended, ready
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._turns: list[Turn] = []
        self._slots: Sequence[Slot] = ()
        self._slowdown = slowdown
        self._batch: Batch | None = None
        self._room: Room | None = None
        self._takes = 0
        self._takes_seconds = 1.0  # running mean for a request
        self._stop_at = math.inf
        self.state = LOADING
        self.failure: BaseException | None = None

    @property
    def load_figures(self) -> dict[str, int]:
        """The numbers of slots, busy slots, queued requests and blocks."""
        figures = {"slots": len(self._slots), "busy": len(self._turns), "waiting": len(self._waiting)}
        return figures if self._room is None else {**figures, **self._room.figures}

    def submit(self, ticket: Ticket) -> None:
        """Adds a request to the queue.

        Raises ApiError: 503 while loading or stopping, 429 if the queue is full.
        """
        with self._changed:
            if self.state != READY:
                raise _unavailable(self.state)
            if len(self._turns) + len(self._waiting) >= len(self._slots) + self._limit:  # a free slot takes one soon
                seconds = self._takes_seconds * (1 + len(self._waiting) / max(len(self._slots), 1))
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
            room = self._room = Room(self._slots, self._turns, self._metrics.suspended)
            decoder = self._slots[0].model.decoder
            self._pace = Pace(self._slowdown, decoder.most)
            if decoder.stacks and len(self._slots) > 1:
                rows = decoder.most + max(GUESS_ROWS, len(self._slots))
                self._batch = Batch(self._slots[0].model, rows)
            self._metrics.watch(lambda: self.load_figures)
            with self._changed:
                if self.state == LOADING:
                    self.state = READY
            if self.state == READY:
                self._ready()
            while self._turns or self.state == READY:
                self._round(room)
        except BaseException as error:
            self.failure = error
        finally:
            self._ended()

    def _round(self, room: Room) -> None:
        """Runs the engine for all busy slots, once."""
        with self._changed:
            while not self._turns and not self._waiting and self.state == READY:
                self._changed.wait()
            now = time.monotonic()
            for ticket in [ticket for ticket in self._waiting if now > ticket.deadline]:
                self._waiting.remove(ticket)
                ticket.deliver(_late())
            self._admit(room)
        for turn in [turn for turn in self._turns if turn.job is None]:
            if room.begins(turn):
                self._advance(turn, None)
        turns = [turn for turn in list(self._turns) if self._goes_on(turn) and turn.job is not None]
        turns = [turn for turn in turns if not turn.lost or room.resumes(turn)]
        if self._batch is not None and len(turns) > 1:
            self._run(turns, room)
        else:
            for turn in turns:
                self._run([turn], room)

    def _admit(self, room: Room) -> None:
        free = [slot for slot in self._slots if all(turn.slot is not slot for turn in self._turns)]
        while free and self._waiting and room.admits(self._waiting[0].choices[0]):
            ticket = self._waiting.popleft()
            choice = ticket.choices.popleft()
            slot = _best(free, choice)
            free.remove(slot)
            self._takes += 1
            slot.used = self._takes
            self._turns.append(Turn(ticket, choice, slot, self._write(choice, slot)))

    def _goes_on(self, turn: Turn) -> bool:
        """Whether a turn still needs the engine; ends it if its client is gone or its time is over."""
        ticket, now = turn.ticket, time.monotonic()
        if ticket.cancelled:
            self._release(turn)
            self._metrics.cancelled()
        elif now > min(ticket.deadline, self._stop_at):
            self._release(turn)
            ticket.deliver(_late() if now > ticket.deadline else _unavailable(STOPPING))
        else:
            return True
        return False

    def _run(self, turns: Sequence[Turn], room: Room) -> None:
        """Runs the jobs of turns together, or that of one, and continues their answers."""
        started = time.monotonic()
        wanted = [job for turn in turns for job in [turn.work] if job is not None]  # of all turns
        cut = wanted if len(wanted) == 1 else self._pace.cut(wanted)
        going = []
        for turn, job in zip(turns, cut):
            try:
                if job is not None and room.runs(turn, job):
                    going.append((turn, job))
            except Failure as error:
                self._advance(turn, error)
        if not going and len(turns) > 1:  # no room for later ones, no rows for the first one
            if turns[0] in self._turns:
                self._run(turns[:1], room)
            return
        steps = read = 0
        for (turn, job), result in zip(going, self._compute([job for _, job in going])):
            if job.last == 0:
                steps += 1
            elif isinstance(result, Computed):
                read += len(result.hidden)
            if job.sequence is turn.slot or isinstance(result, Exception):  # else it got back what it had lost
                self._advance(turn, result)
        seconds = time.monotonic() - started
        self._pace.learn(seconds, steps, read)
        if steps or read:
            self._metrics.run(seconds, steps, read)

    def _compute(self, jobs: Sequence[Job]) -> Sequence[Computed | Exception]:
        try:
            if self._batch is None or len(jobs) == 1:
                return [compute(job) for job in jobs]
            return self._batch.run(jobs)
        except Exception as error:
            return [error] * len(jobs)

    def _advance(self, turn: Turn, result: Computed | Exception | None) -> None:
        """Continues an answer with the result of its job, up to its next job; delivers the pieces in between."""
        steps, turn.job = turn.steps, None
        try:
            if isinstance(result, Exception):
                event = steps.throw(result)
            else:
                event = next(steps) if result is None else steps.send(result)
            while not isinstance(event, Job):
                self._deliver(turn, event)
                if event.finish:
                    return
                event = next(steps)
            turn.job = event
        except Exception as error:
            turn.slot.reset()
            self._release(turn)
            turn.ticket.deliver(_failed(error))

    def _deliver(self, turn: Turn, piece: Piece) -> None:
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
            self._takes_seconds += 0.2 * (time.monotonic() - ticket.came - self._takes_seconds)
            ticket.deliver(None)
        elif self.state == STOPPING:
            ticket.deliver(_unavailable(STOPPING))
        else:  # back of the queue: other requests go first
            with self._changed:
                if not ticket.cancelled:
                    self._waiting.append(ticket)

    def _release(self, turn: Turn) -> None:
        self._turns.remove(turn)
        turn.slot.settle()


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

"""The bundles of a server. The request's `model` chooses one, which is loaded at its first use.

When memory is short, the least recently used ones are unloaded, each after its running requests. Everything here runs
in the event loop; models are loaded and run in the threads of their schedulers.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from axrun.errors import Failure
from axrun.serve.errors import ApiError, sentence, stopped
from axrun.serve.metrics import GAUGES
from axrun.serve.scheduler import LOADING, READY, STOPPING, Scheduler
from axrun.serve.served import Served

Say = Callable[[str], None]


class Models:
    """The models in order; the first one is loaded at the start, and is meant if a request names none.

    `failure` is the exception that ended the server, if any.
    """

    def __init__(
        self,
        listed: Sequence[Served],
        queue: int,
        allow: Callable[[str], bool],
        say: Say,
        ready: Callable[[str], None],
        ended: Callable[[], None],
    ) -> None:
        """`queue`: requests that may wait for a model. `ready` is called with the name of each model that was loaded.

        `allow(message)` decides whether to load a model that does not fit the memory. `ended` is called when the only
        model ends, the first one cannot be loaded, or a loaded one fails: the server must end.
        """
        self.listed, self._queue, self._allow, self._say = listed, queue, allow, say
        self._ready, self._ended = ready, ended
        self._alone = len(listed) == 1
        self._by_name = {name: served for served in listed for name in served.names}
        self._waiting: dict[Served, list[asyncio.Future[None]]] = {served: [] for served in listed}
        self._loads: dict[Served, asyncio.Task[None]] = {}
        self._uses = 0
        self._began = self._stopping = False
        self.failure: BaseException | None = None

    @property
    def first(self) -> Served:
        return self.listed[0]

    @property
    def names(self) -> tuple[str, ...]:
        """All names that a request may give."""
        return tuple(self._by_name)

    @property
    def state(self) -> str:
        """That of the only model. Several are ready when the first one was loaded once."""
        if self._stopping:
            return STOPPING
        first = self.first.scheduler
        if self._alone and first is not None:
            return first.state
        return READY if self._began else LOADING

    @property
    def load_figures(self) -> dict[str, int]:
        """The numbers of slots, busy slots, waiting requests and blocks, of all models."""
        figures = {**dict.fromkeys(GAUGES, 0), "waiting": sum(map(len, self._waiting.values()))}
        for served in self.listed:
            if served.scheduler is not None:
                for key, value in served.scheduler.load_figures.items():
                    figures[key] += value
        return figures

    def find(self, name: str | None) -> Served:
        """The model of a request. Raises ApiError."""
        if name is None:
            return self.first
        if name not in self._by_name:
            listed = ", ".join(self._by_name)
            raise ApiError(404, f"No such model; this server has: {listed}.", "model_not_found", "model")
        return self._by_name[name]

    def begin(self) -> None:
        """Starts to load the first model. Call it in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._one_load, self._idle = asyncio.Lock(), asyncio.Event()  # created here for Python 3.9
        if self._alone:
            self._start(self.first, self._loop.create_future())
        else:
            self._bring(self.first)

    async def enter(self, served: Served, seconds: float) -> None:
        """Waits up to `seconds` until a model is loaded, and keeps it loaded until `leave`. Raises ApiError.

        The only model is not waited for: its scheduler refuses requests while it is loading.
        """
        self._uses += 1
        served.used = self._uses
        if self._alone or (served.loaded and not served.leaving):
            served.active += 1
            return
        if self._stopping:
            raise stopped()
        if len(self._waiting[served]) >= self._queue:
            words = f"{self._queue} requests are already waiting for this model; try again later."
            raise ApiError(429, words, "rate_limit_exceeded", retry_after=2)
        loaded: asyncio.Future[None] = self._loop.create_future()
        self._waiting[served].append(loaded)
        self._bring(served)
        try:
            await asyncio.wait_for(loaded, seconds)
        except asyncio.TimeoutError:
            self._give_up(served, loaded)
            raise ApiError(504, "The model was not loaded within the server's time limit.", "timeout") from None
        except asyncio.CancelledError:
            self._give_up(served, loaded)
            raise

    def leave(self, served: Served) -> None:
        """Ends what `enter` began."""
        served.active -= 1
        if not served.active and not self._alone:
            self._idle.set()

    def _give_up(self, served: Served, loaded: asyncio.Future[None]) -> None:
        """Ends a wait. `_load` may have let the request in at the same moment: then it leaves."""
        if loaded.done() and not loaded.cancelled() and loaded.exception() is None:
            self.leave(served)

    def stop(self, grace: float) -> None:
        """Refuses requests that wait for a model; those that run have `grace` seconds to finish."""
        self._stopping = True
        for task in self._loads.values():
            task.cancel()
        for served in self.listed:
            if served.scheduler is not None:
                served.scheduler.stop(grace)

    def join(self, seconds: float) -> None:
        """Waits for the schedulers to end. Raises the exception that ended one."""
        for served in self.listed:
            if served.scheduler is not None:
                served.scheduler.join(seconds)
                self.failure = self.failure or served.scheduler.failure
            served.close()
        if self.failure is not None:
            raise self.failure

    def _bring(self, served: Served) -> None:
        """Starts to load a model, unless that has begun."""
        if served not in self._loads:
            self._loads[served] = self._loop.create_task(self._load(served))

    async def _load(self, served: Served) -> None:
        """Loads a model when it is its turn, and lets the requests in that wait for it."""
        error: ApiError | None = None
        try:
            async with self._one_load:
                if not served.loaded:
                    await self._loop.run_in_executor(None, served.expect_unchanged)
                    held = await self._make_room(served)
                    done: asyncio.Future[None] = self._loop.create_future()
                    self._start(served, done, held)
                    await done
        except ApiError as failed:
            error = failed
        except asyncio.CancelledError:
            error = stopped()
        except Exception as failed:  # a request must not wait for a load that has ended
            error = _failed(served, failed)
        del self._loads[served]
        if error is not None and not self._began and not self._stopping:  # the first one, at the start
            self.failure = self.failure or Failure(error.message)
            self._ended()
        waiting, self._waiting[served] = self._waiting[served], []
        for future in waiting:
            if future.done():  # its time was over
                continue
            if error is not None:
                future.set_exception(error)
                continue
            served.active += 1
            future.set_result(None)

    async def _make_room(self, served: Served) -> int:
        """Unloads models until another one fits the memory; returns the bytes that the others hold.

        A model whose keys and values would not fit even alone needs room for one context only, as a single one does.
        Raises ApiError if it cannot fit.
        """
        least = False
        while True:
            loaded = [other for other in self.listed if other.scheduler is not None]
            held = sum(other.held for other in loaded)
            shortage = await self._loop.run_in_executor(None, served.shortage, held, least)
            if shortage is None:
                return held
            fits = shortage.needs.total <= shortage.left + sum(other.freed for other in loaded)
            if not fits and not least:
                least = True
                continue
            if not fits:
                if self._allow(shortage.text()):
                    return held
                words = f"{served.name} cannot be loaded: {shortage.text()}."
                raise ApiError(503, words, "insufficient_memory", "model")
            idle = [other for other in loaded if not other.active]
            other = min(idle or loaded, key=lambda other: other.used)
            other.leaving = True
            if other.active:
                self._say(f"model '{other.name}' is unloaded after its requests, to make room for '{served.name}'")
            try:
                while other.active:
                    self._idle.clear()
                    await self._idle.wait()
                await self._unload(other)
            finally:
                other.leaving = False

    async def _unload(self, served: Served) -> None:
        """Nothing but `served` may refer to its scheduler: a thread that still did would keep the model from gc."""
        assert served.scheduler is not None
        served.scheduler.stop(0.0)
        await self._loop.run_in_executor(None, served.join)
        served.forget()
        await self._loop.run_in_executor(None, gc.collect)
        self._say(f"unloaded model '{served.name}'")

    def _start(self, served: Served, done: asyncio.Future[None], held: int = 0) -> None:
        """Starts the scheduler of a model; `done` is resolved when it accepts requests, or has failed before.

        `held`: bytes of the free memory that other models hold.
        """

        def ready() -> None:
            self._ready(served.name)
            self._call(self._on_ready, done)

        def ended() -> None:
            self._call(self._on_end, served, scheduler, done)

        scheduler = Scheduler(
            functools.partial(served.load, held), self._queue, served.metrics, ended, ready, served.slowdown
        )
        served.scheduler = scheduler
        scheduler.start()

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Calls a function in the event loop, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed after a forced shutdown
            self._loop.call_soon_threadsafe(function, *arguments)

    def _on_ready(self, done: asyncio.Future[None]) -> None:
        self._began = True
        if not done.done():
            done.set_result(None)

    def _on_end(self, served: Served, scheduler: Scheduler, done: asyncio.Future[None]) -> None:
        failure = scheduler.failure
        if self._alone or (failure is not None and done.done()):
            self.failure = failure
            self._ended()
        elif failure is not None:
            served.forget()
            if not self._began:
                self.failure = failure
            done.set_exception(_failed(served, failure))
        elif not done.done():  # the server stopped while it was loading
            done.set_exception(stopped())


def _failed(served: Served, failure: BaseException) -> ApiError:
    if not isinstance(failure, Failure):
        traceback.print_exception(type(failure), failure, failure.__traceback__)
        return ApiError(500, "Internal error; see the server log.", "internal_error")
    return ApiError(500, f"{served.name} cannot be loaded: {sentence(failure)}", "model_failed", "model")

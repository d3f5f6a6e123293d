"""An HTTP/1.1 connection with a timeout on every wait and a lingering close.

uvicorn parses requests with h11 and runs the application. This adds what a public port needs:

| waiting for | limit |
|---|---|
| the head of a request | `read_timeout` from the start of the connection or the end of the last response |
| its body | `read_timeout`, in `Exchange.body` |
| the application | set with `scope["state"]["patience"]`, by default twice `read_timeout` |
| the client to read the rest of a finished response | `read_timeout` |
| the client to close after us | LINGER_SECONDS, LINGER_BYTES |

At the connection limit, a new connection replaces the least important one.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from axrun.serve.answer import to_json
from axrun.serve.errors import ApiError

MAX_CONNECTIONS = 512
LINGER_SECONDS = 5.0
LINGER_BYTES = 16 << 20
READ_AHEAD = 1 << 16  # bytes of pipelined requests to buffer while one is answered
GRACE_SECONDS = 1.0  # from the client's half-close to the first probe whether it still reads
PROBE_SECONDS = 0.25


class _Transport:
    """A transport whose close() is the protocol's lingering close."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None], closing: Callable[[], bool]) -> None:
        self._transport, self.close, self._closing = transport, close, closing

    def is_closing(self) -> bool:
        return self._closing() or self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Protocol(H11Protocol):
    """One connection; uvicorn creates an instance for each."""

    _timer: asyncio.TimerHandle | None = None
    _prober: asyncio.TimerHandle | None = None
    _since = 0.0  # start of the current wait
    _kept = False  # the application is generating a response
    _welcome = False  # the application has accepted a request from this connection
    _refused = False
    _closing = False
    _eof = False  # the client half-closed the connection
    _probed = False
    _discarded = 0

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.app_state = {**self.app_state, "patience": self._patience}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._raw = transport
        super().connection_made(_Transport(transport, self._close, lambda: self._closing))  # type: ignore[arg-type]
        self._wait(self.timeout_keep_alive)
        if len(self.connections) > MAX_CONNECTIONS:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        if self._closing:
            self._discarded += len(data)
            if self._discarded > LINGER_BYTES:
                self._raw.abort()
            return
        super().data_received(data)
        if self.flow.read_paused and self.conn.their_state is h11.DONE and self._ahead() < READ_AHEAD:
            self.flow.resume_reading()  # otherwise the end of the connection would go unnoticed

    def eof_received(self) -> bool:  # type: ignore[override]
        """Half-close: the client may still read, so its response continues; `_probe` detects a client that left."""
        self._eof = True
        if self._closing:
            return False
        state = self.conn.their_state
        if state is h11.SEND_BODY or (state is h11.IDLE and self._ahead()):
            self._refuse(ApiError(400, "The request ended before it was complete.", "invalid_http"))
        elif self._answering():
            self._probe_after(GRACE_SECONDS)
        else:
            self.transport.close()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        for timer in (self._timer, self._prober):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        cycle = self.cycle
        super().handle_events()
        if self.cycle is not cycle and not self._closing:
            self._probed = False
            self._wait(2 * self.timeout_keep_alive)
            if self._eof:
                self._probe_after(GRACE_SECONDS)

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        self._kept = False
        if self.transport.is_closing():
            return
        self._wait(self.timeout_keep_alive)
        self.flow.resume_reading()
        if self.conn.our_state is h11.DONE and self.conn.their_state is h11.DONE:
            self.conn.start_next_cycle()
            self.handle_events()
            if self._eof and not self._answering():
                self.transport.close()
        else:  # the body was not read
            self.transport.close()

    def shutdown(self) -> None:
        if self._answering():
            self.cycle.keep_alive = False
        elif self._closing:
            self._raw.abort()
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, msg, "invalid_http"))

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _ahead(self) -> int:
        """Bytes received that belong to no request yet."""
        return len(self.conn.trailing_data[0])

    def _wait(self, seconds: float) -> None:
        """Sets the single deadline of the connection."""
        if self._timer is not None:
            self._timer.cancel()
        self._since = self.loop.time()
        self._timer = self.loop.call_later(seconds, self._late)

    def _patience(self, seconds: float, keep: bool = False) -> None:
        """Extends the deadline for the application. With `keep`, no new connection may replace this one."""
        if self._answering() and not self._closing:
            self._kept = keep
            self._welcome |= keep
            self._wait(seconds)

    def _late(self) -> None:
        if self._closing or self._answering() or self.transport.get_write_buffer_size():
            self._raw.abort()
        elif self.cycle is None or self._ahead():
            words = f"No request arrived within {self.timeout_keep_alive} seconds."
            self._refuse(ApiError(408, words, "timeout"))
        else:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Responds in place of the application, and closes the connection."""
        self._say(error)
        self._refused = True
        self.transport.close()

    def _say(self, error: ApiError) -> None:
        """Sends an error, unless a response has begun."""
        if self._answering():
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        body = to_json(error.json())
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        with contextlib.suppress(h11.LocalProtocolError):
            for part in (
                h11.Response(status_code=error.status, headers=headers, reason=b""),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(part) or b"")

    def _close(self) -> None:
        """Closes after the client has read the response, or after a timeout.

        Closing a socket with unread data resets the connection, and the client may lose a response that it has not read
        yet. So we half-close first and discard what still arrives:
        https://www.rfc-editor.org/rfc/rfc9112#section-9.6
        """
        if self._closing:
            return
        unread = self._refused or self.conn.their_state in (h11.SEND_BODY, h11.ERROR) or self._ahead()
        self._closing, self._kept = True, False
        self._wait(min(LINGER_SECONDS, self.timeout_keep_alive))
        if self._eof or not unread:
            self._raw.close()
            return
        self.flow.resume_reading()
        with contextlib.suppress(OSError):  # reset by the client
            self._raw.write_eof()

    def _make_room(self) -> None:
        """Drops the least important connection: one that is closing, one without a request yet, else the oldest."""
        others = [other for other in self.connections if isinstance(other, Protocol) and other is not self]
        idle = [other for other in others if not other._kept]
        if idle:
            min(idle, key=lambda other: (not other._closing, other._welcome, other._since))._drop()
        else:
            self._refuse(_crowded())

    def _drop(self) -> None:
        if not self._closing and (self.cycle is None or self._answering()):
            self._say(_crowded())
        self._closing = True
        self.connections.discard(self)  # at once: many may arrive before connection_lost is called
        self._raw.abort()

    def _probe_after(self, seconds: float) -> None:
        if self._prober is not None:
            self._prober.cancel()
        self._prober = self.loop.call_later(seconds, self._probe)

    def _probe(self) -> None:
        """Checks whether a client that half-closed is still there.

        A closed and a half-closed socket look the same until data is sent to them. Clients ignore an interim response:
        https://www.rfc-editor.org/rfc/rfc9110#section-15.2
        """
        if self._closing or not self._answering():
            return
        if _is_reset(self.transport.get_extra_info("socket").fileno()):
            self._raw.abort()
            return
        if not (self._probed or self.cycle.response_started or self.cycle.scope["http_version"] == "1.0"):
            self._probed = True
            interim = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
            self.transport.write(self.conn.send(interim) or b"")
        self._probe_after(PROBE_SECONDS)


def _is_reset(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _crowded() -> ApiError:
    return ApiError(503, "Too many connections are open.", "service_unavailable")

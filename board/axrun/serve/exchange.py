"""One HTTP request and its response, over ASGI: https://asgi.readthedocs.io/en/latest/specs/www.html"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from axrun.serve.answer import to_json
from axrun.serve.errors import ApiError

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

JSON = "application/json"


class Gone(Exception):
    """The client disconnected."""


class Exchange:
    """A request and its response. `status` is 0 until the response begins.

    HEAD is handled as a GET without a body in the response. If the body of a request was not read completely, the
    response closes the connection.
    """

    def __init__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self.method = "GET" if scope["method"] == "HEAD" else str(scope["method"])
        self.path = str(scope["path"])
        self._headers: dict[str, str] = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        self.status = 0
        self.always: dict[str, str] = {}  # headers of any response
        self.form: Callable[[ApiError], Any] = ApiError.json  # of errors
        self._patience = scope.get("state", {}).get("patience", lambda seconds, keep=False: None)
        chunked = self.has("transfer-encoding")
        self._announced = 0 if chunked else int(self.header("content-length") or 0)
        self._unread = chunked or self._announced > 0
        # a proxy may disagree on where the body ends: https://www.rfc-editor.org/rfc/rfc9112#section-6.1
        self._ambiguous = chunked and self.has("content-length")

    def header(self, name: str) -> str:
        """A header by its lower-case name; empty if absent."""
        return self._headers.get(name, "")

    def has(self, name: str) -> bool:
        """Whether the header is present."""
        return name in self._headers

    async def body(self, limit: int, seconds: float) -> bytes:
        """The request body. Raises ApiError if it exceeds `limit` bytes or takes too long, Gone on a disconnect."""
        try:
            return await asyncio.wait_for(self._body(limit), seconds)
        except asyncio.TimeoutError:
            raise ApiError(408, f"The body did not arrive within {seconds:g} seconds.", "timeout") from None

    def patience(self, seconds: float, keep: bool = False) -> None:
        """Sets the deadline of the next step. `keep`: the connection must not be dropped for a new one meanwhile."""
        self._patience(seconds, keep)

    async def gone(self) -> None:
        """Returns when the client disconnects. Call it after the body was read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def reply(self, status: int, body: bytes, kind: str = JSON, headers: Mapping[str, str] | None = None) -> None:
        """Sends a complete response."""
        await self.begin(status, kind, {"content-length": str(len(body)), **(headers or {})})
        await self.send(body, more=False)

    async def refuse(self, error: ApiError) -> None:
        """Sends an error as the response."""
        await self.reply(error.status, to_json(self.form(error)), headers=error.headers)

    async def begin(self, status: int, kind: str, headers: Mapping[str, str]) -> None:
        """Sends the head of a response with content type `kind`."""
        self.status = status
        pairs = [
            (name.encode("latin-1"), value.encode("latin-1")) for name, value in {**self.always, **headers}.items()
        ]
        pairs.append((b"content-type", kind.encode("latin-1")))
        if self._unread or self._ambiguous:
            pairs.append((b"connection", b"close"))
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})

    async def send(self, body: bytes, more: bool = True) -> None:
        """Sends a part of the body; waits while the client's buffer is full."""
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def _body(self, limit: int) -> bytes:
        parts, size, more = [], 0, self._announced <= limit
        while more and size <= limit:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise Gone
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            parts.append(part)
        if max(size, self._announced) > limit:
            raise ApiError(413, f"The body is larger than {limit} bytes.", "body_too_large")
        self._unread = False
        return b"".join(parts)

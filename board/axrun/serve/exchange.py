"""One HTTP request and its answer, over ASGI: https://asgi.readthedocs.io/en/latest/specs/www.html"""

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
    """The client hung up."""


class Exchange:
    """`status` is 0 until the answer begins; a HEAD request is a GET whose answer has no body.

    An answer to a request whose body was not read to its end closes the connection.
    """

    def __init__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self.method = "GET" if scope["method"] == "HEAD" else str(scope["method"])
        self.path = str(scope["path"])
        self._headers: dict[str, str] = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        self.status = 0
        self._patience = scope.get("state", {}).get("patience", lambda seconds, keep=False: None)
        chunked = self.has("transfer-encoding")
        self._announced = 0 if chunked else int(self.header("content-length") or 0)
        self._unread = chunked or self._announced > 0
        # a proxy before us may have seen another end of the body: https://www.rfc-editor.org/rfc/rfc9112#section-6.1
        self._ambiguous = chunked and self.has("content-length")

    def header(self, name: str) -> str:
        """A header by its name in small letters; empty where there is none."""
        return self._headers.get(name, "")

    def has(self, name: str) -> bool:
        """Whether there is such a header."""
        return name in self._headers

    async def body(self, limit: int, seconds: float) -> bytes:
        """The request's body. Raises ApiError when it is longer than `limit` bytes or takes too long, and Gone."""
        try:
            return await asyncio.wait_for(self._body(limit), seconds)
        except asyncio.TimeoutError:
            raise ApiError(408, f"The body did not arrive within {seconds:g} seconds.", "timeout") from None

    def patience(self, seconds: float, keep: bool = False) -> None:
        """What follows may take so long. `keep`: the connection is not dropped for a new one meanwhile."""
        self._patience(seconds, keep)

    async def gone(self) -> None:
        """Returns when the client has hung up. To be waited for once the body was read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def reply(self, status: int, body: bytes, kind: str = JSON, headers: Mapping[str, str] | None = None) -> None:
        """A whole answer."""
        await self.begin(status, kind, {"content-length": str(len(body)), **(headers or {})})
        await self.send(body, more=False)

    async def refuse(self, error: ApiError) -> None:
        """An error as an answer."""
        await self.reply(error.status, to_json(error.json()), headers=error.headers)

    async def begin(self, status: int, kind: str, headers: Mapping[str, str]) -> None:
        """The head of an answer, of content type `kind`."""
        self.status = status
        pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        pairs.append((b"content-type", kind.encode("latin-1")))
        if self._unread or self._ambiguous:
            pairs.append((b"connection", b"close"))
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})

    async def send(self, body: bytes, more: bool = True) -> None:
        """A part of its body; waits while the client is behind."""
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

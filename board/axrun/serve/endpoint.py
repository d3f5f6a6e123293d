"""What a route that generates consists of: its request, how it is read, and the form of its answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from axrun.serve.errors import ApiError
from axrun.serve.field_kinds import Fields
from axrun.serve.order import Order, Reader
from axrun.serve.writer import Piece

EVENT_STREAM = "text/event-stream; charset=utf-8"

Body = Mapping[str, Any]


class Reply(Protocol):
    """A response under construction. `media` is the content type of a stream."""

    media: str

    def whole(self, pieces: Sequence[Piece]) -> bytes:
        """The body of a response without streaming."""

    def events(self, piece: Piece) -> Iterator[bytes]:
        """What a stream sends for a piece; may be nothing."""

    def end(self) -> bytes:
        """What a stream sends after the last piece."""

    def failed(self, error: ApiError) -> bytes:
        """What a stream sends last if it cannot go on."""


class WholeReply:
    """A response that is never streamed."""

    media = EVENT_STREAM

    def events(self, piece: Piece) -> Iterator[bytes]:
        raise NotImplementedError

    def end(self) -> bytes:
        raise NotImplementedError

    def failed(self, error: ApiError) -> bytes:
        raise NotImplementedError


Read = Callable[[Reader, Body], Order]
Respond = Callable[[str, str, Body, Order], Reply]


@dataclass(frozen=True)
class Endpoint:
    """The fields of a request, the function that reads it, and the form of the response.

    `answer` names the response in the OpenAPI document. `reply` gets the name and the fingerprint of the model, the
    validated body, and what was read from it. `streams`: the request may ask for a stream, of content type `media`.
    `error` names the form of an error.
    """

    summary: str
    fields: Fields
    answer: str
    read: Read
    reply: Respond
    streams: bool = True
    media: str = "text/event-stream"
    error: str = "Error"

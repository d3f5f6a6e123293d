"""Responses of /api/chat and /api/generate: complete ones, and streams of lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from axrun.serve.answer import to_json
from axrun.serve.endpoint import Reply, Respond
from axrun.serve.errors import ApiError
from axrun.serve.ollama import error_of
from axrun.serve.order import Order
from axrun.serve.split import Part, Splitter, calls_of, text_of, thoughts_of
from axrun.serve.writer import Piece

NDJSON = "application/x-ndjson"
NANOSECONDS = 1e9

Content = Callable[[list[Part]], dict[str, Any]]


def chat(parts: list[Part]) -> dict[str, Any]:
    """A message of /api/chat."""
    calls = [{"function": {"name": call.name, "arguments": call.arguments}} for call in calls_of(parts)]
    message = {"role": "assistant", "content": text_of(parts), **_thinking(parts)}
    return {"message": {**message, "tool_calls": calls} if calls else message}


def generate(parts: list[Part]) -> dict[str, Any]:
    """The text of /api/generate."""
    return {"response": text_of(parts), **_thinking(parts)}


def _thinking(parts: list[Part]) -> dict[str, Any]:
    thoughts = thoughts_of(parts)
    return {"thinking": thoughts} if thoughts else {}


def with_content(content: Content) -> Respond:
    """Makes the responses of an endpoint."""

    def respond(model: str, fingerprint: str, body: Mapping[str, Any], order: Order) -> Reply:
        return Answer(content, model, order)

    return respond


class Answer:
    """A response under construction."""

    media = NDJSON

    def __init__(self, content: Content, model: str, order: Order) -> None:
        self._content, self._model = content, model
        self._splitter = Splitter(order.thinking, order.tools)
        self._came, self._first = time.monotonic(), 0.0

    def whole(self, pieces: Sequence[Piece]) -> bytes:
        """The body of a response without streaming; without pieces, the model was only loaded."""
        if not pieces:
            return self._line([], {"done": True, "done_reason": "load"})
        self._first = pieces[0].at
        parts = [part for piece in pieces for part in self._splitter.push(piece)]
        return self._line(parts, self._end(pieces[-1]))

    def events(self, piece: Piece) -> Iterator[bytes]:
        """The lines for a piece; may be none."""
        self._first = self._first or piece.at
        if parts := self._splitter.push(piece):
            yield self._line(parts, {"done": False})
        if piece.finish:
            yield self._line([], self._end(piece))

    def end(self) -> bytes:
        """Nothing: the last line has the figures."""
        return b""

    def failed(self, error: ApiError) -> bytes:
        """The line of an error."""
        return to_json(error_of(error)) + b"\n"

    def _line(self, parts: list[Part], rest: Mapping[str, Any]) -> bytes:
        head = {"model": self._model, "created_at": timestamp(time.time())}
        return to_json({**head, **self._content(parts), **rest}) + b"\n"

    def _end(self, piece: Piece) -> dict[str, Any]:
        """Durations are in nanoseconds; that of the prompt includes the time in the queue."""
        return {
            "done": True,
            "done_reason": piece.finish,
            "total_duration": int((piece.at - self._came) * NANOSECONDS),
            "load_duration": 0,
            "prompt_eval_count": piece.prompt,
            "prompt_eval_duration": int((self._first - self._came) * NANOSECONDS),
            "eval_count": piece.written,
            "eval_duration": int((piece.at - self._first) * NANOSECONDS),
        }


def timestamp(seconds: float) -> str:
    """https://www.rfc-editor.org/rfc/rfc3339"""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat().replace("+00:00", "Z")

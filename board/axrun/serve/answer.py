"""Response bodies in OpenAI's format: complete ones and stream chunks, for chat completions and completions."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from axrun.serve.endpoint import EVENT_STREAM, Respond
from axrun.serve.errors import ApiError
from axrun.serve.logprobs import Scored, chat_logprobs, completion_logprobs
from axrun.serve.order import Order
from axrun.serve.split import Splitter, calls_of, text_of, thoughts_of
from axrun.serve.writer import Piece
from axrun.text.tool_formats import Call

DONE = b"data: [DONE]\n\n"
ID_LENGTH = 9  # of a call: what Mistral's templates accept


@dataclass(frozen=True)
class Style:
    """The response format of an endpoint. `body` and `chunk` wrap the text of a choice, complete and in a stream."""

    prefix: str
    whole: str
    part: str
    body: Callable[[str], dict[str, Any]]
    chunk: Callable[[str], dict[str, Any]]
    opening: dict[str, Any] | None
    closing: dict[str, Any]
    logprobs: Callable[[Sequence[Scored]], dict[str, Any]]


CHAT = Style(
    prefix="chatcmpl-",
    whole="chat.completion",
    part="chat.completion.chunk",
    body=lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    chunk=lambda text: {"delta": {"content": text}},
    opening={"delta": {"role": "assistant", "content": ""}},
    closing={"delta": {}},
    logprobs=chat_logprobs,
)
COMPLETION = Style(
    prefix="cmpl-",
    whole="text_completion",
    part="text_completion",
    body=lambda text: {"text": text},
    chunk=lambda text: {"text": text},
    opening=None,
    closing={"text": ""},
    logprobs=completion_logprobs,
)


@dataclass
class Answer:
    """A response under construction."""

    style: Style
    model: str
    fingerprint: str
    order: Order
    media: str = EVENT_STREAM
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    _last: dict[int, Piece] = field(default_factory=dict)
    _splitters: dict[int, Splitter] = field(default_factory=dict)
    _calls: dict[int, int] = field(default_factory=dict)  # calls so far, by choice

    def whole(self, pieces: Sequence[Piece]) -> bytes:
        """The body of a response without streaming."""
        choices = []
        for index in sorted({piece.choice for piece in pieces}):
            mine = [piece for piece in pieces if piece.choice == index]
            self._last[index] = mine[-1]
            parts = [part for piece in mine for part in self._splitter(index).push(piece)]
            body, finish = self.style.body(text_of(parts)), self._splitter(index).finish(mine[-1])
            if thoughts := thoughts_of(parts):
                body["message"]["reasoning_content"] = thoughts
            if calls := calls_of(parts):
                body["message"].update(content=text_of(parts) or None, tool_calls=[_call(call) for call in calls])
            scored = [score for piece in mine for score in piece.scored]
            choices.append(self._choice(index, body, scored, finish))
        return to_json({**self._head(self.style.whole), "choices": choices, "usage": self.usage()})

    def events(self, piece: Piece) -> Iterator[bytes]:
        """The server-sent events for a piece; may be none."""
        index = piece.choice
        if index not in self._last and self.style.opening:
            yield self._event([self._choice(index, self.style.opening)])
        self._last[index] = piece
        parts = self._splitter(index).push(piece)
        text, thoughts = text_of(parts), thoughts_of(parts)
        if thoughts:
            yield self._event([self._choice(index, {"delta": {"reasoning_content": thoughts}})])
        if text or piece.scored:
            yield self._event([self._choice(index, self.style.chunk(text), piece.scored)])
        for call in calls_of(parts):
            at = self._calls[index] = self._calls.get(index, -1) + 1
            yield self._event([self._choice(index, {"delta": {"tool_calls": [{"index": at, **_call(call)}]}})])
        if piece.finish:
            yield self._event([self._choice(index, self.style.closing, None, self._splitter(index).finish(piece))])

    def end(self) -> bytes:
        """The events after the last piece."""
        if not self.order.include_usage:
            return DONE
        return event({**self._head(self.style.part), "choices": [], "usage": self.usage()}) + DONE

    def failed(self, error: ApiError) -> bytes:
        """The event of an error."""
        return event(error.json())

    def usage(self) -> dict[str, Any]:
        """Token counts so far; a prompt counts once, however many choices share it."""
        prompts = [piece for piece in self._last.values() if piece.choice % self.order.n == 0]
        prompt, written = sum(piece.prompt for piece in prompts), sum(piece.written for piece in self._last.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": sum(piece.reused for piece in prompts)},
        }

    def _splitter(self, index: int) -> Splitter:
        return self._splitters.setdefault(index, Splitter(self.order.thinking, self.order.tools))

    def _choice(
        self, index: int, body: dict[str, Any], scored: Sequence[Scored] | None = None, finish: str = ""
    ) -> dict[str, Any]:
        logprobs = self.style.logprobs(scored) if self.order.scored and scored is not None else None
        return {"index": index, **body, "logprobs": logprobs, "finish_reason": finish or None}

    def _event(self, choices: list[dict[str, Any]]) -> bytes:
        usage = {"usage": None} if self.order.include_usage else {}
        return event({**self._head(self.style.part), "choices": choices, **usage})

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.style.prefix + self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def in_style(style: Style) -> Respond:
    """Makes the responses of an endpoint."""
    return lambda model, fingerprint, body, order: Answer(style, model, fingerprint, order)


def _call(call: Call) -> dict[str, Any]:
    return {"id": call_id(), "type": "function", "function": {"name": call.name, "arguments": call.json()}}


def call_id() -> str:
    """A new id of a tool call."""
    return uuid.uuid4().hex[:ID_LENGTH]


def event(value: Any) -> bytes:
    """https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation"""
    return b"data: " + to_json(value) + b"\n\n"


def to_json(value: Any) -> bytes:
    """UTF-8; a lone surrogate, which JSON can express and UTF-8 cannot, becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")

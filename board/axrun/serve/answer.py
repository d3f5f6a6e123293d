"""Response bodies in OpenAI's format: complete ones and stream chunks, for chat completions and completions."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from axrun.serve.logprobs import Scored, chat_logprobs, completion_logprobs
from axrun.serve.tools import Tools
from axrun.serve.writer import Piece
from axrun.text.thinking import Thinking, ThinkStream
from axrun.text.tool_formats import Call
from axrun.text.tool_stream import ToolStream

DONE = b"data: [DONE]\n\n"
TOOL_CALLS = "tool_calls"  # finish reason
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
    """A response under construction, with `n` choices per prompt. `scored`: log probabilities were requested."""

    style: Style
    model: str
    fingerprint: str
    scored: bool
    n: int = 1
    include_usage: bool = False
    tools: Tools | None = None
    thinking: Thinking | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    _last: dict[int, Piece] = field(default_factory=dict)
    _thoughts: dict[int, ThinkStream] = field(default_factory=dict)
    _streams: dict[int, ToolStream] = field(default_factory=dict)
    _calls: dict[int, int] = field(default_factory=dict)  # calls so far, by choice

    def whole(self, pieces: Sequence[Piece]) -> bytes:
        """The body of a response without streaming."""
        choices = []
        for index in sorted({piece.choice for piece in pieces}):
            mine = [piece for piece in pieces if piece.choice == index]
            self._last[index] = mine[-1]
            body, finish = self.style.body("".join(piece.text for piece in mine)), mine[-1].finish
            if self.thinking is not None:
                body = {"message": _with_thoughts(body["message"], self.thinking)}
            if self.tools is not None:
                body, finish = self._with_calls(body["message"], finish)
            scored = [score for piece in mine for score in piece.scored]
            choices.append(self._choice(index, body, scored, finish))
        return to_json({**self._head(self.style.whole), "choices": choices, "usage": self.usage()})

    def events(self, piece: Piece) -> Iterator[bytes]:
        """The server-sent events for a piece; may be none."""
        if piece.choice not in self._last and self.style.opening:
            yield self._event([self._choice(piece.choice, self.style.opening)])
        self._last[piece.choice] = piece
        text, finish = piece.text, piece.finish
        if self.thinking is not None:
            stream = self._thoughts.setdefault(piece.choice, self.thinking.stream())
            parts = [stream.push(text), *([stream.finish()] if finish else [])]
            thoughts, text = ("".join(each) for each in zip(*parts))
            if thoughts:
                yield self._event([self._choice(piece.choice, {"delta": {"reasoning_content": thoughts}})])
            piece = piece._replace(text=text)
        calls: list[dict[str, Any]] = []
        if self.tools is not None:
            text, calls, finish = self._separate(piece)
        if text or piece.scored:
            yield self._event([self._choice(piece.choice, self.style.chunk(text), piece.scored)])
        for call in calls:
            yield self._event([self._choice(piece.choice, {"delta": {"tool_calls": [call]}})])
        if finish:
            yield self._event([self._choice(piece.choice, self.style.closing, None, finish)])

    def end(self) -> bytes:
        """The events after the last piece."""
        if not self.include_usage:
            return DONE
        return event({**self._head(self.style.part), "choices": [], "usage": self.usage()}) + DONE

    def usage(self) -> dict[str, Any]:
        """Token counts so far; a prompt counts once, however many choices share it."""
        prompts = [piece for piece in self._last.values() if piece.choice % self.n == 0]
        prompt, written = sum(piece.prompt for piece in prompts), sum(piece.written for piece in self._last.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": sum(piece.reused for piece in prompts)},
        }

    def _with_calls(self, message: dict[str, Any], finish: str) -> tuple[dict[str, Any], str]:
        """A complete message with its calls apart from the text, and the finish reason."""
        assert self.tools is not None
        stream = self.tools.stream()
        parts = [*stream.push(message["content"]), *stream.finish()]
        calls = [_call(part) for part in parts if isinstance(part, Call)]
        if not calls:
            return {"message": message}, finish
        text = "".join(part for part in parts if isinstance(part, str))
        message = {**message, "content": text or None, "tool_calls": calls}
        return {"message": message}, TOOL_CALLS if finish == "stop" else finish

    def _separate(self, piece: Piece) -> tuple[str, list[dict[str, Any]], str]:
        """The text and calls that a piece completes, and the finish reason."""
        assert self.tools is not None
        stream = self._streams.setdefault(piece.choice, self.tools.stream())
        parts = [*stream.push(piece.text), *(stream.finish() if piece.finish else ())]
        calls = []
        for part in parts:
            if isinstance(part, Call):
                at = self._calls[piece.choice] = self._calls.get(piece.choice, -1) + 1
                calls.append({"index": at, **_call(part)})
        finish = TOOL_CALLS if piece.finish == "stop" and piece.choice in self._calls else piece.finish
        return "".join(part for part in parts if isinstance(part, str)), calls, finish

    def _choice(
        self, index: int, body: dict[str, Any], scored: Sequence[Scored] | None = None, finish: str = ""
    ) -> dict[str, Any]:
        logprobs = self.style.logprobs(scored) if self.scored and scored is not None else None
        return {"index": index, **body, "logprobs": logprobs, "finish_reason": finish or None}

    def _event(self, choices: list[dict[str, Any]]) -> bytes:
        usage = {"usage": None} if self.include_usage else {}
        return event({**self._head(self.style.part), "choices": choices, **usage})

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.style.prefix + self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def _with_thoughts(message: dict[str, Any], thinking: Thinking) -> dict[str, Any]:
    stream = thinking.stream()
    parts = [stream.push(message["content"]), stream.finish()]
    thoughts, text = ("".join(each) for each in zip(*parts))
    return {**message, "content": text, **({"reasoning_content": thoughts} if thoughts else {})}


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    return {"id": uuid.uuid4().hex[:ID_LENGTH], "type": "function", "function": function}


def event(value: Any) -> bytes:
    """https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation"""
    return b"data: " + to_json(value) + b"\n\n"


def to_json(value: Any) -> bytes:
    """UTF-8; a lone surrogate, which JSON can express and UTF-8 cannot, becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")

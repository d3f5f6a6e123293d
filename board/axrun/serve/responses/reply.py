"""Responses of /v1/responses: complete ones, and the events of a stream.

https://platform.openai.com/docs/api-reference/responses-streaming
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from axrun.serve.answer import call_id, to_json
from axrun.serve.endpoint import EVENT_STREAM
from axrun.serve.errors import ApiError
from axrun.serve.field_kinds import NO_LIMIT
from axrun.serve.order import Choice, Order
from axrun.serve.split import Part, Splitter, Thoughts
from axrun.serve.writer import Piece
from axrun.text.tool_formats import Call

MESSAGE, REASONING, CALL = "message", "reasoning", "function_call"
PREFIXES = {MESSAGE: "msg_", REASONING: "rs_", CALL: "fc_"}
TEXTS = {MESSAGE: "output_text", REASONING: "reasoning_text"}  # type of the content, and name of its events
ITEMS: dict[str, dict[str, Any]] = {MESSAGE: {"role": "assistant"}, REASONING: {"summary": []}}
CONTENTS: dict[str, dict[str, Any]] = {MESSAGE: {"annotations": [], "logprobs": []}, REASONING: {}}
LOGPROBS: dict[str, dict[str, Any]] = {MESSAGE: {"logprobs": []}, REASONING: {}}  # of events
IN_PROGRESS, COMPLETED, INCOMPLETE, FAILED = "in_progress", "completed", "incomplete", "failed"

Event = dict[str, Any]


class Response:
    """A response under construction. Its items are thoughts, text and calls, in their order in the answer."""

    media = EVENT_STREAM

    def __init__(self, model: str, fingerprint: str, body: Mapping[str, Any], order: Order) -> None:
        self._head = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            **_settings(body, order),
        }
        self._splitter = Splitter(order.thinking, order.tools)
        self._output: list[dict[str, Any]] = []
        self._kind = ""  # of the item that is being written
        self._text = ""  # of that item, so far
        self._last: Piece | None = None
        self._sent = 0  # events

    def whole(self, pieces: Sequence[Piece]) -> bytes:
        """The body of a response without streaming."""
        for piece in pieces:
            for _ in self._steps(piece):
                pass
        return to_json(self._response(_status(pieces[-1])))

    def events(self, piece: Piece) -> Iterator[bytes]:
        """The server-sent events for a piece; may be none."""
        return map(self._event, self._steps(piece))

    def end(self) -> bytes:
        """Nothing: the last event has the whole response."""
        return b""

    def failed(self, error: ApiError) -> bytes:
        """The event of a failed response, and that of the error, which clients raise."""
        about = {"code": "server_error", "message": error.message}
        response = {**self._response(FAILED), "error": about}
        words = {"code": error.code, "message": error.message, "param": error.param}
        return self._event({"type": "response.failed", "response": response}) + self._event(
            {"type": "error", **words, **error.json()}
        )

    def _steps(self, piece: Piece) -> Iterator[Event]:
        begins, self._last = self._last is None, piece
        if begins:
            yield {"type": "response.created", "response": self._response(IN_PROGRESS)}
            yield {"type": "response.in_progress", "response": self._response(IN_PROGRESS)}
        for part in self._splitter.push(piece):
            yield from self._add(part)
        if piece.finish:
            if not self._output:
                yield from self._open(MESSAGE)
            status = _status(piece)
            yield from self._close(status)
            yield {"type": f"response.{status}", "response": self._response(status)}

    def _add(self, part: Part) -> Iterator[Event]:
        if isinstance(part, Call):
            yield from self._call(part)
            return
        kind, text = (REASONING, part.text) if isinstance(part, Thoughts) else (MESSAGE, part)
        if self._kind != kind:
            yield from self._close()
            yield from self._open(kind)
        self._text += text
        yield {"type": f"response.{TEXTS[kind]}.delta", **self._place(), "delta": text, **LOGPROBS[kind]}

    def _open(self, kind: str) -> Iterator[Event]:
        self._kind, self._text = kind, ""
        item = {"id": _id(kind), "type": kind, "status": IN_PROGRESS, **ITEMS[kind], "content": []}
        self._output.append(item)
        yield self._item("added")
        yield {"type": "response.content_part.added", **self._place(), "part": self._content()}

    def _close(self, status: str = COMPLETED) -> Iterator[Event]:
        """The end of the item that is being written, if any."""
        if not self._kind:
            return
        kind = self._kind
        yield {"type": f"response.{TEXTS[kind]}.done", **self._place(), "text": self._text, **LOGPROBS[kind]}
        yield {"type": "response.content_part.done", **self._place(), "part": self._content()}
        self._output[-1].update(status=status, content=[self._content()])
        self._kind = ""
        yield self._item("done")

    def _call(self, call: Call) -> Iterator[Event]:
        yield from self._close()
        item = {"id": _id(CALL), "type": CALL, "status": IN_PROGRESS, "call_id": call_id(), "name": call.name}
        arguments = call.json()
        self._output.append({**item, "arguments": ""})
        yield self._item("added")
        place = {"item_id": item["id"], "output_index": len(self._output) - 1}
        yield {"type": "response.function_call_arguments.delta", **place, "delta": arguments}
        done = {"name": call.name, "arguments": arguments}
        yield {"type": "response.function_call_arguments.done", **place, **done}
        self._output[-1].update(arguments=arguments, status=COMPLETED)
        yield self._item("done")

    def _item(self, what: str) -> Event:
        at = len(self._output) - 1
        return {"type": f"response.output_item.{what}", "output_index": at, "item": self._output[at]}

    def _place(self) -> dict[str, Any]:
        at = len(self._output) - 1
        return {"item_id": self._output[at]["id"], "output_index": at, "content_index": 0}

    def _content(self) -> dict[str, Any]:
        return {"type": TEXTS[self._kind], "text": self._text, **CONTENTS[self._kind]}

    def _event(self, step: Event) -> bytes:
        """https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation"""
        numbered = {**step, "sequence_number": self._sent}
        self._sent += 1
        return b"event: %s\ndata: %s\n\n" % (step["type"].encode(), to_json(numbered))

    def _response(self, status: str) -> dict[str, Any]:
        cut = {"reason": "max_output_tokens"} if status == INCOMPLETE else None
        return {
            **self._head,
            "status": status,
            "error": None,
            "incomplete_details": cut,
            "output": self._output,
            "usage": None if status == IN_PROGRESS else self._usage(),
        }

    def _usage(self) -> dict[str, Any] | None:
        piece = self._last
        if piece is None:
            return None
        return {
            "input_tokens": piece.prompt,
            "input_tokens_details": {"cached_tokens": piece.reused, "cache_write_tokens": 0},
            "output_tokens": piece.written,
            "output_tokens_details": {"reasoning_tokens": self._splitter.thought},
            "total_tokens": piece.prompt + piece.written,
        }


def _settings(body: Mapping[str, Any], order: Order) -> dict[str, Any]:
    """The settings of a request as they apply."""
    (choice,), limit = order.choices, body.get("max_output_tokens")
    assert isinstance(choice, Choice)
    return {
        "background": False,
        "instructions": body.get("instructions"),
        "max_output_tokens": None if limit == NO_LIMIT else limit,
        "metadata": body.get("metadata", {}),
        "parallel_tool_calls": body.get("parallel_tool_calls", True),
        "previous_response_id": None,
        "reasoning": {"effort": body.get("reasoning", {}).get("effort"), "summary": None},
        "store": False,
        "temperature": choice.sampling.temperature,
        "text": {"format": body.get("text", {}).get("format", {"type": "text"})},
        "tool_choice": body.get("tool_choice", "auto"),
        "tools": body.get("tools", []),
        "top_p": choice.sampling.top_p,
        "truncation": "disabled",
        "user": body.get("user"),
    }


def _status(piece: Piece) -> str:
    return INCOMPLETE if piece.finish == "length" else COMPLETED


def _id(kind: str) -> str:
    return PREFIXES[kind] + uuid.uuid4().hex

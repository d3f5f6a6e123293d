"""Reads requests to /api/chat and /api/generate as requests for chat completions and completions."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from axrun.serve.errors import ApiError
from axrun.serve.field_kinds import NO_LIMIT
from axrun.serve.ollama.fields import ENDLESS, SHARED
from axrun.serve.order import Order, Reader

RANDOM = -1  # as a seed
# names of fields in chat completions and here
NAMES = {"response_format": "format", "tools": "tools"}
EMPTY = Order((), 1, scored=False, stream=False, include_usage=False)  # only load the model


def read_chat(reader: Reader, body: Mapping[str, Any]) -> Order:
    """Raises ApiError for a request that cannot be answered."""
    if not body.get("messages"):
        return EMPTY
    made = {**_settings(body), "messages": list(_messages(body["messages"]))}
    if "tools" in body:
        made["tools"] = body["tools"]
    with _renamed("messages"):
        return reader.chat(made)


def read_generate(reader: Reader, body: Mapping[str, Any]) -> Order:
    """A model without a chat template continues the prompt. Raises ApiError for a request that cannot be answered."""
    if not body.get("prompt"):
        return EMPTY
    with _renamed("prompt"):
        system = body.get("system")
        if body.get("raw") or (reader.template is None and not system):
            return reader.completion({**_settings(body), "prompt": body["prompt"]})
        messages = [{"role": "system", "content": system}] if system else []
        return reader.chat({**_settings(body), "messages": [*messages, {"role": "user", "content": body["prompt"]}]})


def _settings(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that both kinds of completions share."""
    options, form, think = body.get("options", {}), body.get("format"), body.get("think")
    made = {name: options[name] for name in SHARED if name in options}
    if made.get("seed") == RANDOM:
        del made["seed"]
    limit = options.get("num_predict", NO_LIMIT)
    made.update(stream=body.get("stream", True), max_tokens=NO_LIMIT if limit in ENDLESS else limit)
    if isinstance(form, dict):
        made["response_format"] = {"type": "json_schema", "json_schema": {"schema": form}}
    elif form:
        made["response_format"] = {"type": "json_object"}
    if think is not None:
        made["reasoning_effort" if isinstance(think, str) else "enable_thinking"] = think
    return made


def _messages(given: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Messages of a chat completion. Calls get ids here."""
    calls = _Calls()
    for message in given:
        made = {"role": message["role"], "content": message.get("content", "")}
        if message.get("thinking"):
            made["reasoning_content"] = message["thinking"]
        if message.get("tool_calls"):
            made["tool_calls"] = []
            for call in message["tool_calls"]:
                function = {"name": call["function"]["name"], "arguments": call["function"].get("arguments", {})}
                made["tool_calls"].append({"id": calls.open(function["name"]), "function": function})
        call = calls.close(message.get("tool_name", "")) if message["role"] == "tool" else None
        yield made if call is None else {**made, "tool_call_id": call}


class _Calls:
    """Ids of calls. A result belongs to the first open call of its function, or else to the first open call."""

    def __init__(self) -> None:
        self._open: set[str] = set()
        self._all: deque[str] = deque()
        self._of: dict[str, deque[str]] = {}
        self._count = 0

    def open(self, function: str) -> str:
        call = f"call{self._count:05}"
        self._count += 1
        self._open.add(call)
        self._all.append(call)
        self._of.setdefault(function, deque()).append(call)
        return call

    def close(self, function: str) -> str | None:
        for queue in (self._of.get(function, deque()), self._all):
            while queue:
                call = queue.popleft()
                if call in self._open:
                    self._open.remove(call)
                    return call
        return None


@contextlib.contextmanager
def _renamed(prompt: str) -> Iterator[None]:
    try:
        yield
    except ApiError as error:
        error.param = {**NAMES, "messages": prompt, "prompt": prompt}.get(error.param or "", error.param)
        raise

"""Reads a request to /v1/responses as a request for a chat completion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from axrun.serve.errors import ApiError, invalid
from axrun.serve.order import Order, Reader
from axrun.serve.responses.fields import SHARED
from axrun.serve.tools import read_arguments

Item = Mapping[str, Any]

SYSTEM = ("system", "developer")
# names of fields in chat completions and here
NAMES = {"messages": "input", "response_format": "text.format"}


def read(reader: Reader, body: Mapping[str, Any]) -> Order:
    """Raises ApiError for a request that cannot be answered."""
    try:
        return reader.chat(chat_request(body))
    except ApiError as error:
        error.param = NAMES.get(error.param or "", error.param)
        raise


def chat_request(body: Mapping[str, Any]) -> dict[str, Any]:
    """The request for a chat completion with the same meaning."""
    made = {name: body[name] for name in SHARED if name in body}
    made["messages"] = _messages(body)
    if "max_output_tokens" in body:
        made["max_completion_tokens"] = body["max_output_tokens"]
    if "tools" in body:
        made["tools"] = [{"type": "function", "function": _function(tool)} for tool in body["tools"]]
    if "tool_choice" in body:
        choice = body["tool_choice"]
        named = isinstance(choice, dict)
        made["tool_choice"] = {"type": "function", "function": {"name": choice["name"]}} if named else choice
    if "effort" in body.get("reasoning", {}):
        made["reasoning_effort"] = body["reasoning"]["effort"]
    if "format" in body.get("text", {}):
        made["response_format"] = _format(body["text"]["format"])
    return made


def _format(form: Mapping[str, Any]) -> dict[str, Any]:
    if form["type"] != "json_schema":
        return {"type": form["type"]}
    if "schema" not in form:
        raise invalid("text.format of type json_schema needs a schema.", "text.format.schema")
    return {"type": "json_schema", "json_schema": {"schema": form["schema"]}}


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tool[key] for key in ("name", "description", "parameters") if key in tool}


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a conversation.

    The instructions and system messages at its beginning are one message, because many templates accept only one.
    """
    given = body["input"]
    items: Sequence[Item] = [{"role": "user", "content": given}] if isinstance(given, str) else given
    leading = next((at for at, item in enumerate(items) if item.get("role") not in SYSTEM), len(items))
    system = [body["instructions"]] if body.get("instructions") else []
    system += [_text(item["content"]) for item in items[:leading]]
    messages = [{"role": "system", "content": "\n\n".join(system)}] if system else []
    return [*messages, *_turns(items, leading)]


def _turns(items: Sequence[Item], first: int) -> Iterator[dict[str, Any]]:
    """The messages of the items from `first` on. The items of one answer are one message of the assistant."""
    answer: dict[str, Any] = {}
    for number, item in enumerate(items[first:], first):
        kind = item.get("type", "message")
        made = kind == "message" and item["role"] == "assistant"
        begins = kind == "reasoning" or (made and ("content" in answer or "tool_calls" in answer))
        if answer and (begins or not (made or kind == "function_call")):
            yield answer
            answer = {}
        if kind == "function_call_output":
            yield {"role": "tool", "tool_call_id": item["call_id"], "content": _text(item["output"])}
        elif kind == "message" and not made:
            yield {"role": item["role"], "content": _text(item["content"])}
        else:
            answer.setdefault("role", "assistant")
            _add(item, kind, answer, f"input[{number}]")
    if answer:
        yield answer


def _add(item: Item, kind: str, answer: dict[str, Any], where: str) -> None:
    """Adds an item to the message of the assistant. Raises ApiError for arguments that are not JSON."""
    if kind == "message":
        answer["content"] = _text(item["content"])
    elif kind == "reasoning":
        answer["reasoning_content"] = _text(item.get("content") or item.get("summary") or "")
    else:
        arguments = read_arguments(item["arguments"], f"{where}.arguments")
        call = {"id": item["call_id"], "function": {"name": item["name"], "arguments": arguments}}
        answer.setdefault("tool_calls", []).append(call)


def _text(content: str | Sequence[Mapping[str, Any]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)

"""Fields that clients send and that change nothing are accepted; what cannot be read is refused in plain words."""

from __future__ import annotations

from typing import Any

import pytest

from axrun.serve import schema
from tests.serve.server import Server

ASK = [{"role": "user", "content": "who are you?"}]
VALUES: dict[str, Any] = {
    "string": "low",
    "boolean": True,
    "object": {"type": "ephemeral"},
    "integer": 7,
    "array": [],
}


def ignored(fields: schema.Fields) -> dict[str, Any]:
    found = {name: field for name, field in fields.items() if field.get("description") == schema.IGNORED}
    return {name: VALUES[field["type"][0]] for name, field in found.items()}


def switched_off(fields: schema.Fields) -> dict[str, Any]:
    return {name: field["enum"][0] for name, field in fields.items() if field.get("x-refused") and "enum" in field}


def content(answer: dict[str, Any]) -> str:
    text: str = answer["choices"][0]["message"]["content"]
    return text


def test_what_changes_nothing_is_accepted(server: Server) -> None:
    plain = content(server.chat("who are you?"))
    given = {**ignored(schema.CHAT), **switched_off(schema.CHAT)}
    assert {"user", "metadata", "store", "reasoning_effort", "verbosity", "cache_prompt", "cache_control"} < set(given)
    assert {"min_p", "skip_special_tokens", "tool_choice"} < set(given)
    assert content(server.chat("who are you?", **given, tools=[])) == plain
    completion = {**ignored(schema.COMPLETION), **switched_off(schema.COMPLETION), "prompt": "1+1=", "max_tokens": 1}
    assert server.complete(**completion)["choices"][0]["text"] == "2"


def test_messages_as_other_servers_and_libraries_keep_them(server: Server) -> None:
    """A conversation with what clients leave in it, and the same without."""
    parts = [{"type": "text", "text": "who are you?", "cache_control": {"type": "ephemeral"}}]
    assistant: dict[str, Any] = {
        "role": "assistant",
        "reasoning_content": "Hm.",
        "annotations": [],
        "refusal": None,
        "audio": None,
    }
    bare = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": ""}, *ASK]
    answers: list[dict[str, Any]] = [{"content": None}, {}, {"content": None, "tool_calls": [], "function_call": None}]
    for answer in answers:
        kept = [bare[0], {**assistant, **answer}, {"role": "user", "content": parts, "cache_control": {}, "name": "me"}]
        seen = [
            server.post("chat/completions", messages=messages, temperature=0, max_tokens=8).json()
            for messages in (bare, kept)
        ]
        assert seen[0]["usage"]["prompt_tokens"] == seen[1]["usage"]["prompt_tokens"]
        assert content(seen[0]) == content(seen[1])


def test_no_model_is_the_served_one(server: Server) -> None:
    for model in ({}, {"model": None}):
        response = server.client.post("/v1/chat/completions", json={"messages": ASK, "max_tokens": 1, **model})
        assert (response.status_code, response.json()["model"]) == (200, "qwen2")
    assert server.client.post("/v1/completions", json={"prompt": "x", "model": ""}).status_code == 404


@pytest.mark.parametrize("limit", [-1, None])
def test_no_limit_of_tokens(server: Server, endless: dict[str, int], limit: int | None) -> None:
    """To the end of the context, where a completion otherwise has 16 tokens."""
    given = {"logit_bias": endless, "max_tokens": limit}
    for answer in (server.complete("1+1=", **given), server.chat("1+1=", **given)):
        assert answer["usage"]["total_tokens"] == 256
        assert answer["choices"][0]["finish_reason"] == "length"
    assert server.chat("1+1=", max_completion_tokens=limit)["choices"][0]["finish_reason"] == "stop"


def test_ignore_eos_goes_on(server: Server) -> None:
    """The same answer, and more behind it; stop strings still end it."""
    plain = server.chat("1+1=")
    longer = server.chat("1+1=", ignore_eos=True, max_tokens=30)
    assert plain["usage"]["completion_tokens"] < 30 == longer["usage"]["completion_tokens"]
    assert content(longer).startswith(content(plain))
    assert longer["choices"][0]["finish_reason"] == "length"
    assert server.chat("1+1=", ignore_eos=True, stop=content(plain)[0])["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, "an image"),
        ({"type": "input_image", "image_url": "https://example.org/a.png"}, "an image"),
        ({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}, "audio"),
        ({"type": "file", "file": {"file_id": "x"}}, "a file"),
        ({"type": "video_url", "video_url": {"url": "x"}}, "a video"),
    ],
)
def test_what_is_no_text_is_refused_by_name(server: Server, part: dict[str, Any], kind: str) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, part]}]
    error = server.post("chat/completions", messages=messages)
    assert error.status_code == 400
    assert error.json()["error"] == {
        "message": f"This model reads text only: content part 2 of message 1 is {kind}.",
        "type": "invalid_request_error",
        "param": "messages[0].content[1]",
        "code": "unsupported_content",
    }

"""Fields without effect are accepted; message parts that are not text are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from axrun.serve import schema
from axrun.serve.field_kinds import IGNORED, Fields
from tests.serve.server import Server, Start

ASK = [{"role": "user", "content": "who are you?"}]
VALUES: dict[str, Any] = {
    "string": "low",
    "boolean": True,
    "object": {"type": "ephemeral"},
    "integer": 7,
    "array": [],
}


def ignored(fields: Fields) -> dict[str, Any]:
    found = {name: field for name, field in fields.items() if field.get("description") == IGNORED}
    return {name: VALUES[field["type"][0]] for name, field in found.items()}


def switched_off(fields: Fields) -> dict[str, Any]:
    return {name: field["enum"][0] for name, field in fields.items() if field.get("x-refused") and "enum" in field}


def content(answer: dict[str, Any]) -> str:
    text: str = answer["choices"][0]["message"]["content"]
    return text


def test_fields_without_effect_are_accepted(server: Server) -> None:
    plain = content(server.chat("who are you?"))
    given = {**ignored(schema.CHAT), **switched_off(schema.CHAT)}
    assert {"user", "metadata", "store", "keep_alive", "verbosity", "cache_prompt", "cache_control"} < set(given)
    assert {"tfs_z", "skip_special_tokens", "function_call"} < set(given)
    assert content(server.chat("who are you?", **given, tools=[])) == plain
    completion = {**ignored(schema.COMPLETION), **switched_off(schema.COMPLETION), "prompt": "1+1=", "max_tokens": 1}
    assert server.complete(**completion)["choices"][0]["text"] == "2"


def test_messages_with_extra_fields_of_other_servers_are_accepted(server: Server) -> None:
    """A conversation with extra fields, and the same without them."""
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


def test_the_served_model_is_the_default(server: Server) -> None:
    for model in ({}, {"model": None}):
        response = server.client.post("/v1/chat/completions", json={"messages": ASK, "max_tokens": 1, **model})
        assert (response.status_code, response.json()["model"]) == (200, "qwen2")
    assert server.client.post("/v1/completions", json={"prompt": "x", "model": ""}).status_code == 404


@pytest.mark.parametrize("limit", [-1, None])
def test_without_a_token_limit(server: Server, endless: dict[str, int], limit: int | None) -> None:
    """The answer goes on to the end of the context; the default of completions is 16 tokens."""
    given = {"logit_bias": endless, "max_tokens": limit}
    for answer in (server.complete("1+1=", **given), server.chat("1+1=", **given)):
        assert answer["usage"]["total_tokens"] == 256
        assert answer["choices"][0]["finish_reason"] == "length"
    assert server.chat("1+1=", max_completion_tokens=limit)["choices"][0]["finish_reason"] == "stop"


def test_ignore_eos_continues_past_stop_tokens(server: Server) -> None:
    """The answer is the same but longer; stop strings still end it."""
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
def test_parts_that_are_not_text_are_refused_by_name(server: Server, part: dict[str, Any], kind: str) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, part]}]
    error = server.post("chat/completions", messages=messages)
    assert error.status_code == 400
    assert error.json()["error"] == {
        "message": f"This model reads text only: content part 2 of message 1 is {kind}.",
        "type": "invalid_request_error",
        "param": "messages[0].content[1]",
        "code": "unsupported_content",
    }


def test_variables_reach_the_chat_template(bundle_s8: Path, tmp_path: Path, start: Start) -> None:
    """Visible in the number of prompt tokens: the template repeats a word for each variable."""
    bundle = tmp_path / "bundle"
    shutil.copytree(bundle_s8, bundle)
    source = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking is defined and not enable_thinking %}"
        "{{ 'x ' * 10 }}{% endif %}"
        "{% if reasoning_effort == 'high' %}{{ 'x ' * 20 }}{% endif %}{{ 'x ' * (more or 0) }}"
    )
    (bundle / "hf" / "chat_template.jinja").write_text(source)
    server = start(bundle, "--name", "qwen2").ready()

    def tokens(**body: Any) -> int:
        return int(server.chat("1+1=", max_tokens=1, **body)["usage"]["prompt_tokens"])

    plain, ten = tokens(), tokens(enable_thinking=False)
    assert ten > plain == tokens(enable_thinking=True) == tokens(reasoning_effort="low")
    assert tokens(reasoning_effort="none") == ten == tokens(chat_template_kwargs={"enable_thinking": False})
    assert tokens(reasoning_effort="high") - plain == 2 * (ten - plain)
    assert tokens(chat_template_kwargs={"more": 20}) == tokens(reasoning_effort="high")
    assert tokens(enable_thinking=False, chat_template_kwargs={"enable_thinking": None}) > plain


def test_sampling_fields_under_the_names_of_other_servers(server: Server) -> None:
    same = [{"repetition_penalty": 4.0}, {"repeat_penalty": 4.0}, {"repeat_penalty": 4.0, "repeat_last_n": -1}]
    plain, *seen = [content(server.chat("who are you?", max_tokens=24, **body)) for body in ({}, *same)]
    assert seen == [seen[0]] * 3 != [plain] * 3
    assert content(server.chat("who are you?", max_tokens=24, repeat_penalty=4.0, repeat_last_n=0)) == plain
    greedy = server.complete("1+1=", temperature=1.9, min_p=1.0, max_tokens=8, seed=1)["choices"][0]["text"]
    assert greedy == server.complete("1+1=", max_tokens=8)["choices"][0]["text"]


def test_samplers_of_other_servers(server: Server, endless: dict[str, int]) -> None:
    def text(**body: Any) -> str:
        given = {"max_tokens": 60, "logit_bias": endless, **body}
        return str(server.complete("1+1=", **given)["choices"][0]["text"])

    plain = text()
    assert text(temperature=1, top_n_sigma=0.001, seed=3) == plain
    assert text(temperature=1, typical_p=0.001, seed=3) != text(temperature=1, seed=3)
    assert text(temperature=1, top_k=2, xtc_probability=1, xtc_threshold=0.001, seed=3) != plain
    assert text(dry_multiplier=5, dry_allowed_length=1) != plain
    assert text(dry_multiplier=5, dry_allowed_length=1, dry_penalty_last_n=0) == plain
    broken = text(dry_multiplier=5, dry_allowed_length=1, dry_sequence_breakers=sorted(set(plain))[:16])
    assert broken != text(dry_multiplier=5, dry_allowed_length=1)


def test_completions_support_response_formats(server: Server) -> None:
    form = {"type": "json_schema", "json_schema": {"schema": {"const": [1, "a"]}}}
    assert json.loads(server.complete("1+1=", max_tokens=100, response_format=form)["choices"][0]["text"]) == [1, "a"]

"""Ollama's routes: the same answers as chat completions, in another form."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from axrun import VERSION
from axrun.serve import ollama
from axrun.serve.ollama.request import _messages as messages_of
from tests.serve.server import MODEL, Server, Start

ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "who are you?"}]
GREEDY = {"temperature": 0}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
ENDLESS = {"type": "array", "minItems": 4000, "items": {"const": 1}}


def post(server: Server, path: str, **body: Any) -> httpx.Response:
    return server.client.post(f"/api/{path}", json={"model": MODEL, **body})


def whole(server: Server, path: str, **body: Any) -> dict[str, Any]:
    response = post(server, path, stream=False, **{"options": GREEDY, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    found: dict[str, Any] = response.json()
    return found


def lines(server: Server, path: str, **body: Any) -> list[dict[str, Any]]:
    response = post(server, path, **{"options": GREEDY, **body})
    assert response.headers["content-type"] == "application/x-ndjson"
    assert response.text.endswith("\n")
    return [json.loads(line) for line in response.text.splitlines()]


def test_the_answer_is_that_of_chat_completions(server: Server) -> None:
    given = server.post("chat/completions", messages=ASK, temperature=0).json()
    expected, usage = given["choices"][0]["message"]["content"], given["usage"]
    made = whole(server, "chat", messages=ASK)
    assert made["message"] == {"role": "assistant", "content": expected}
    assert (made["done"], made["done_reason"], made["model"]) == (True, "stop", MODEL)
    assert (made["prompt_eval_count"], made["eval_count"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert datetime.fromisoformat(made["created_at"]).utcoffset() is not None
    parts = made["prompt_eval_duration"], made["eval_duration"]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(made["total_duration"], abs=10)
    generated = whole(server, "generate", prompt="who are you?", system="Be brief.")
    assert (generated["response"], generated["prompt_eval_count"]) == (expected, usage["prompt_tokens"])
    *chunks, last = lines(server, "chat", messages=ASK)
    assert "".join(chunk["message"]["content"] for chunk in chunks) == expected
    assert {chunk["done"] for chunk in chunks} == {False}
    assert (last["message"]["content"], last["done"], last["eval_count"]) == ("", True, made["eval_count"])
    *chunks, last = lines(server, "generate", prompt="who are you?", system="Be brief.")
    assert "".join(chunk["response"] for chunk in chunks) == expected
    assert last["response"] == ""


def test_raw_prompts_are_completions(server: Server) -> None:
    expected = server.complete("Once", max_tokens=3)["choices"][0]["text"]
    made = whole(server, "generate", prompt="Once", raw=True, options={**GREEDY, "num_predict": 3})
    assert (made["response"], made["done_reason"], made["eval_count"]) == (expected, "length", 3)


def test_options_are_those_of_the_sampler(server: Server) -> None:
    for options in ({"top_k": 1, "temperature": 1.5}, {"repeat_penalty": 4.0}, {"stop": ["a"]}, {"temperature": 1.5}):
        given = {**GREEDY, **options, "seed": 5}
        expected = server.post("chat/completions", messages=ASK, **given).json()["choices"][0]["message"]["content"]
        assert whole(server, "chat", messages=ASK, options={**given, "num_ctx": 4096})["message"]["content"] == expected
    for limit in (-1, -2):
        assert whole(server, "chat", messages=ASK, options={**GREEDY, "num_predict": limit})["done_reason"] == "stop"


def test_calls_have_objects_as_arguments(server_saying: Server) -> None:
    question = [{"role": "user", "content": "c"}]
    message = whole(server_saying, "chat", messages=question, tools=[WEATHER])["message"]
    assert message["content"] == "Let me see."
    assert message["tool_calls"] == [
        {"function": {"name": "weather", "arguments": {"city": city}}} for city in ("Paris", "Rome, Italy")
    ]
    chunks = lines(server_saying, "chat", messages=question, tools=[WEATHER])
    assert [call for chunk in chunks for call in chunk["message"].get("tool_calls", ())] == message["tool_calls"]
    assert chunks[-1]["done_reason"] == "stop"


def test_results_belong_to_the_calls_of_their_function() -> None:
    call: list[dict[str, Any]] = [{"function": {"name": name, "arguments": {}}} for name in ("a", "b", "b")]
    results = [{"role": "tool", "tool_name": name, "content": ""} for name in ("b", "a")]
    made = list(messages_of([{"role": "assistant", "tool_calls": call}, *results, {"role": "tool", "content": ""}]))
    ids = [call["id"] for call in made[0]["tool_calls"]]
    assert len(set(ids)) == 3
    assert [message["tool_call_id"] for message in made[1:]] == [ids[1], ids[0], ids[2]]
    assert "tool_call_id" not in next(messages_of(results))


def test_thoughts(thinker: Server) -> None:
    question = [{"role": "user", "content": "t"}]
    made = whole(thinker, "chat", messages=question)["message"]
    assert (made["thinking"], made["content"]) == ("Hm, so.\n\nWell.", "It is two.")
    open_ = whole(thinker, "generate", prompt="t", think=True)
    assert (open_["thinking"], open_["response"]) == ("Oh, easy!", "It is four.")
    assert whole(thinker, "generate", prompt="t", think="low")["response"] == "It is two."
    chunks = lines(thinker, "chat", messages=question)
    assert "".join(chunk["message"].get("thinking", "") for chunk in chunks) == made["thinking"]


def test_structured_output(server_long: Server) -> None:
    options = {"temperature": 1.5, "num_predict": 600}
    schema = {"type": "object", "properties": {"age": {"enum": [1, 2]}}, "required": ["age"]}
    made = whole(server_long, "chat", messages=ASK, format={**schema, "additionalProperties": False}, options=options)
    assert json.loads(made["message"]["content"])["age"] in (1, 2)
    free = whole(server_long, "generate", prompt="1+1=", format="json", options={**options, "seed": 1})
    assert free["response"].lstrip().startswith("{")


def test_without_a_question_the_model_is_only_loaded(server: Server) -> None:
    bodies: tuple[tuple[str, dict[str, Any]], ...] = (("chat", {"messages": []}), ("generate", {"prompt": ""}))
    for path, empty in bodies:
        for body in ({}, {"keep_alive": "5m"}, empty):
            made = post(server, path, **body).json()
            assert (made["done"], made["done_reason"]) == (True, "load")
    assert post(server, "chat", model="other").status_code == 404


def test_models_are_listed_and_shown(server: Server, bundle_s8: Path) -> None:
    (entry,) = server.client.get("/api/tags").json()["models"]
    assert (entry["name"], entry["model"]) == (f"{MODEL}:latest", f"{MODEL}:latest")
    assert entry["size"] > sum(path.stat().st_size for path in bundle_s8.glob("*.axmodel"))
    assert entry["details"]["quantization_level"] == "s8"
    template = json.loads((bundle_s8 / "hf" / "tokenizer_config.json").read_text())["chat_template"]
    for body in ({}, {"model": MODEL}, {"name": f"{MODEL}:latest", "verbose": True}):
        shown = server.client.post("/api/show", json=body).json()
        assert shown["details"] == entry["details"]
        assert shown["model_info"]["qwen2.context_length"] == 255
        assert shown["template"] == template
        assert "repeat_penalty 1" in shown["parameters"]
    assert server.client.get("/api/version").json() == {"version": VERSION}
    assert server.client.post("/api/pull", json={"model": MODEL}).status_code == 404


def test_names_without_the_default_tag() -> None:
    assert ollama.untagged({"model": "m:latest"}) == {"model": "m"}
    assert ollama.untagged({"name": "m:latest", "x": 1}) == {"model": "m", "x": 1}
    others: tuple[Any, ...] = ({"model": "m"}, {"model": 1}, {}, [], "m:latest")
    for given in others:
        assert ollama.untagged(given) == given


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("chat", {"model": "other", "messages": ASK}, 404, "this server has: qwen2"),
        ("chat", {"messages": [{"role": "robot"}]}, 400, "messages[0].role"),
        ("chat", {"messages": [{"role": "user", "content": "x", "images": ["AAAA"]}]}, 400, "reads text only"),
        ("chat", {"messages": ASK, "options": {"temprature": 1}}, 400, "options.temprature"),
        ("chat", {"messages": ASK, "options": {"mirostat": 1}}, 400, "options.mirostat is not supported"),
        ("chat", {"messages": ASK, "format": {"not": {}}}, 400, "not"),
        ("chat", {"messages": ASK, "format": "xml"}, 400, "format is"),
        ("chat", {"messages": ASK, "max_tokens": 4}, 400, "Unknown parameter: 'max_tokens'"),
        ("generate", {"prompt": "x " * 5000}, 400, "tokens"),
        ("generate", {"prompt": "x", "context": [1, 2]}, 400, "/api/chat"),
        ("generate", {"prompt": "x", "suffix": "y"}, 400, "suffix is not supported"),
        ("generate", {"prompt": "x", "images": ["AAAA"]}, 400, "reads text only"),
    ],
)
def test_errors_have_the_form_of_ollama(
    server: Server, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    response = post(server, path, **body)
    assert response.status_code == status
    assert set(response.json()) == {"error"}
    assert words in response.json()["error"]


def test_an_error_ends_a_stream(bundle_long: Path, start: Start) -> None:
    server = start(bundle_long, "--slots", 1, "--timeout", 1).ready()
    *chunks, last = lines(server, "chat", messages=ASK, format=ENDLESS)
    assert chunks
    assert "time limit" in last["error"]

"""response_format: answers of the server are valid under the schema of the request."""

from __future__ import annotations

import concurrent.futures
import json
from typing import Any

import jsonschema
import pytest

from tests.serve.server import Server, events

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b", None]}, "maxItems": 2},
        "kind": {"const": None},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
HOT = {"temperature": 1.5, "max_tokens": 200}


def form(schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "strict": True, "schema": schema, **more}}


def text(choice: dict[str, Any]) -> str:
    return str(choice["message"]["content"])


def test_every_choice_follows_the_schema(server: Server) -> None:
    made = server.chat("who are you?", response_format=form(PERSON), n=4, seed=1, **HOT)
    for choice in made["choices"]:
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(text(choice)), PERSON)
    assert len({text(choice) for choice in made["choices"]}) == 4


def test_a_stream_has_the_same_text(server: Server) -> None:
    body = {"response_format": form(PERSON), "seed": 7, **HOT}
    whole = text(server.chat("1+1=", **body)["choices"][0])
    with server.stream("chat/completions", messages=[{"role": "user", "content": "1+1="}], **body) as response:
        response.read()
        *chunks, done = events(response)
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == whole


def test_answers_with_and_without_a_schema_run_side_by_side(server: Server) -> None:
    plain = text(server.chat("1+1=")["choices"][0])
    schemas = [{"enum": [f"{number}"]} for number in range(6)]

    def ask(schema: dict[str, Any] | None) -> str:
        return text(server.chat("1+1=", **({} if schema is None else {"response_format": form(schema)}))["choices"][0])

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        seen = list(pool.map(ask, [each for schema in schemas for each in (schema, None)]))
    assert seen[1::2] == [plain] * 6
    assert [json.loads(each) for each in seen[::2]] == [f"{number}" for number in range(6)]


def test_json_object(server: Server, hf_tokenizer: Any) -> None:
    endings = {str(token): 10 for token in hf_tokenizer.encode("}")}
    for body in ({"type": "json_object"}, {"type": "json_object", "schema": {"type": "object", "maxProperties": 0}}):
        made = server.chat("1+1=", response_format=body, n=3, seed=2, logit_bias=endings, **HOT)["choices"]
        ended = [text(choice) for choice in made if choice["finish_reason"] == "stop"]
        assert ended
        assert all(isinstance(json.loads(each), dict) for each in ended)


def test_text_is_the_default(server: Server) -> None:
    assert text(server.chat("1+1=", response_format={"type": "text"})["choices"][0]) == "2"


def test_sampling_settings_cannot_break_the_format(server: Server) -> None:
    """Biases and penalties choose among the tokens that fit."""
    body = {
        "logit_bias": {"5": 100},
        "frequency_penalty": 2,
        "presence_penalty": 2,
        "repetition_penalty": 3,
        "top_k": 1,
    }
    made = server.chat("1+1=", response_format=form(PERSON), **{**HOT, **body})
    jsonschema.validate(json.loads(text(made["choices"][0])), PERSON)


def test_logprobs_are_the_unconstrained_model_s(server: Server) -> None:
    made = server.chat("1+1=", response_format=form({"const": 7}), logprobs=True, top_logprobs=1)
    (entry,) = made["choices"][0]["logprobs"]["content"]
    assert (entry["token"], entry["top_logprobs"][0]["token"]) == ("7", "2")


@pytest.mark.parametrize(
    ("given", "param", "words"),
    [
        ({"type": "json_schema"}, "response_format.json_schema", "needs json_schema"),
        ({"type": "json_schema", "json_schema": {}}, "response_format.json_schema.schema", "Missing required"),
        ({"type": "json_schema", "json_schema": {"schema": []}}, "response_format.json_schema.schema", "an object"),
        ({"type": "grammar"}, "response_format.type", "expected one of"),
        ({"type": "json_object", "grammar": "x"}, "response_format.grammar", "Unknown parameter"),
        (form({"type": "array", "uniqueItems": True}), "response_format", "The schema uses uniqueItems, which is not"),
        (form({"type": "string", "pattern": "(?=a)"}), "response_format", "look-ahead"),
        (form({"enum": ["\ud800"]}), "response_format.json_schema.schema.enum[0]", "half of a surrogate pair"),
        (form({"properties": {"\udfff": {}}}), "response_format.json_schema.schema.properties", "half of a surrogate"),
        (form({"maximum": 10**400}), None, "A number has 401 digits; expected at most 309."),
    ],
)
def test_an_unsupported_format_is_refused_by_name(
    server: Server, given: dict[str, Any], param: str | None, words: str
) -> None:
    ask = [{"role": "user", "content": "1+1="}]
    body = json.dumps({"messages": ask, "response_format": given})  # in ASCII: a client may escape half a character
    error = server.client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert error.status_code == 400, error.text
    assert error.json()["error"]["param"] == param
    assert words in error.json()["error"]["message"]


def test_a_format_needs_stop_tokens(server: Server) -> None:
    ask = [{"role": "user", "content": "1+1="}]
    error = server.post("chat/completions", messages=ask, response_format=form(PERSON), ignore_eos=True)
    assert (error.status_code, error.json()["error"]["param"]) == (400, "ignore_eos")

"""/v1/responses with OpenAI's client: the same answers as chat completions, in another form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, Field, TypeAdapter

from axrun.serve.responses.request import chat_request
from tests.serve.server import MODEL, Server, Start

WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "description": "The weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
CALLS = [("weather", {"city": "Paris"}), ("weather", {"city": "Rome, Italy"})]


class Person(BaseModel):
    name: str = Field(max_length=8)
    age: int = Field(ge=0, le=130)


@pytest.fixture
def saying(server_saying: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server_saying.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def long(server_long: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server_long.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def stream(server: Server, **body: Any) -> list[tuple[str, dict[str, Any]]]:
    """Names and data of all events."""
    with server.stream("responses", temperature=0, **body) as response:
        response.read()
    assert response.headers["content-type"].startswith("text/event-stream")
    *parts, last = response.text.split("\n\n")
    assert last == ""
    lines = [part.split("\n") for part in parts]
    assert all(name.startswith("event: ") and data.startswith("data: ") for name, data in lines)
    return [(name[7:], json.loads(data[6:])) for name, data in lines]


def comparable(response: dict[str, Any]) -> dict[str, Any]:
    """Without ids and times, and without how much of the prompt was in the cache."""
    usage = {**response["usage"], "input_tokens_details": None}
    output = [{key: value for key, value in item.items() if "id" not in key} for item in response["output"]]
    return {**response, "id": "", "created_at": 0, "usage": usage, "output": output}


def calls(output: Any) -> list[tuple[str, Any]]:
    return [(item.name, json.loads(item.arguments)) for item in output if item.type == "function_call"]


def test_the_answer_is_that_of_chat_completions(server: Server) -> None:
    chat = server.chat("who are you?", max_tokens=5)
    body = server.post("responses", input="who are you?", temperature=0, max_output_tokens=5).json()
    response = TypeAdapter(Response).validate_python(body)
    assert response.output_text == chat["choices"][0]["message"]["content"]
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")  # type: ignore[union-attr]
    assert response.usage is not None
    assert response.usage.input_tokens == chat["usage"]["prompt_tokens"]
    assert response.usage.output_tokens == 5
    assert (response.store if hasattr(response, "store") else None, response.model) == (False, MODEL)


def test_items_become_the_messages_of_a_chat(server: Server) -> None:
    """The prompt has the same number of tokens, and the answer is the same."""
    chat = server.post(
        "chat/completions",
        messages=[
            {"role": "system", "content": "Be brief.\n\nBe kind."},
            {"role": "user", "content": "1+1="},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "who are you?"},
        ],
        temperature=0,
    ).json()
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be kind."}]},
        {"type": "message", "role": "user", "content": "1+1="},
        {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "2", "annotations": []}],
        },
        {"role": "user", "content": "who are you?"},
    ]
    body = server.post("responses", instructions="Be brief.", input=items, temperature=0).json()
    assert body["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert body["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]


def test_the_items_of_one_answer_are_one_message() -> None:
    call = {"type": "function_call", "name": "weather", "arguments": '{"city": "Paris"}'}
    items: list[dict[str, Any]] = [
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "content": "Let me see."},
        {**call, "call_id": "a"},
        {**call, "call_id": "b", "arguments": ""},
        {"type": "function_call_output", "call_id": "a", "output": "sunny"},
        {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "rain"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "So."}]},
        {"role": "assistant", "content": "Sunny."},
        {"role": "assistant", "content": "Or not."},
        {"role": "developer", "content": "Stop."},
    ]
    assert chat_request({"input": items})["messages"] == [
        {
            "role": "assistant",
            "reasoning_content": "Hm.",
            "content": "Let me see.",
            "tool_calls": [
                {"id": "a", "function": {"name": "weather", "arguments": {"city": "Paris"}}},
                {"id": "b", "function": {"name": "weather", "arguments": {}}},
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": "sunny"},
        {"role": "tool", "tool_call_id": "b", "content": "rain"},
        {"role": "assistant", "reasoning_content": "So.", "content": "Sunny."},
        {"role": "assistant", "content": "Or not."},
        {"role": "developer", "content": "Stop."},
    ]


def test_calls_and_their_results(saying: openai.OpenAI) -> None:
    """The output of one response is part of the input of the next."""
    response = saying.responses.create(model=MODEL, input="c", tools=[WEATHER], temperature=0)  # type: ignore[list-item]
    message, *made = response.output
    assert (message.type, response.output_text, response.status) == ("message", "Let me see.", "completed")
    assert calls(made) == CALLS
    results = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "s"}
        for item in made
        if item.type == "function_call"
    ]
    question: Any = [{"role": "user", "content": "c"}, *response.output, *results]
    final = saying.responses.create(model=MODEL, input=question, tools=[WEATHER], temperature=0)  # type: ignore[list-item]
    assert final.usage is not None
    assert response.usage is not None
    assert final.usage.input_tokens > response.usage.input_tokens


def test_a_stream_ends_with_the_whole_response(server_saying: Server) -> None:
    """Every event has the form that OpenAI's client declares; the deltas add up to the items."""
    events = stream(server_saying, input="c", tools=[WEATHER])
    form: Any = TypeAdapter(ResponseStreamEvent)
    for number, (name, data) in enumerate(events):
        form.validate_python(data, strict=False)
        assert (data["type"], data["sequence_number"]) == (name, number)
    names = [name.removeprefix("response.") for name, _ in events]
    call = [
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done"),
        "output_item.done",
    ]
    assert names[:5] == ["created", "in_progress", "output_item.added", "content_part.added", "output_text.delta"]
    end = names.index("output_text.done")
    assert set(names[4:end]) == {"output_text.delta"}
    assert names[end + 1 :] == ["content_part.done", "output_item.done", *call, *call, "completed"]
    text = "".join(data["delta"] for name, data in events if name == "response.output_text.delta")
    whole = server_saying.post("responses", input="c", tools=[WEATHER], temperature=0).json()
    assert text == whole["output"][0]["content"][0]["text"] == "Let me see."
    assert comparable(events[-1][1]["response"]) == comparable(whole)
    done = [data["item"] for name, data in events if name == "response.output_item.done"]
    assert done == events[-1][1]["response"]["output"]


def test_thoughts_are_reasoning_items(thinker: Server) -> None:
    events = stream(thinker, input="t")
    names = [name.removeprefix("response.") for name, _ in events]
    assert names[3:5] == ["content_part.added", "reasoning_text.delta"]
    response = events[-1][1]["response"]
    reasoning, message = response["output"]
    assert (reasoning["type"], reasoning["summary"]) == ("reasoning", [])
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm, so.\n\nWell."}]
    assert message["content"][0]["text"] == "It is two."
    usage = response["usage"]
    assert 0 < usage["output_tokens_details"]["reasoning_tokens"] < usage["output_tokens"]
    assert comparable(thinker.post("responses", input="t", temperature=0).json()) == comparable(response)
    easy = thinker.post("responses", input=">", temperature=0, enable_thinking=True).json()
    assert [item["type"] for item in easy["output"]] == ["reasoning", "message"]
    plain = thinker.post("responses", input="t", temperature=0, reasoning={"effort": "none", "summary": "auto"}).json()
    assert plain["reasoning"]["effort"] == "none"


def test_structured_output(long: openai.OpenAI) -> None:
    made = long.responses.parse(
        model=MODEL, input="who are you?", text_format=Person, temperature=1.5, max_output_tokens=600
    )
    assert made.output_parsed is not None
    assert 0 <= made.output_parsed.age <= 130
    with long.responses.stream(model=MODEL, input="1+1=", text_format=Person, max_output_tokens=600) as events:
        for _ in events:
            pass
        assert events.get_final_response().output_parsed is not None
    free = long.responses.create(
        model=MODEL, input="1+1=", text={"format": {"type": "json_object"}}, temperature=0, max_output_tokens=600
    )
    if free.status == "completed":
        assert isinstance(json.loads(free.output_text), dict)


class Weather(BaseModel):
    """The weather in a city."""

    city: str = Field(max_length=8)


def test_parsed_answers_can_be_sent_back(long: openai.OpenAI) -> None:
    """Programs append what the client parsed to the history, with its additions and nulls."""
    limits: dict[str, Any] = {"model": MODEL, "temperature": 0}
    tool = openai.pydantic_function_tool(Weather)
    flat: Any = {"type": "function", **tool["function"]}
    for more in ({"text_format": Person}, {"tools": [flat], "tool_choice": "required"}):
        made = long.responses.parse(input="1+1=", max_output_tokens=600, **limits, **more)
        history = ["1+1=", *(item.model_dump() for item in made.output), "2+2="]
        items: Any = [{"role": "user", "content": item} if isinstance(item, str) else item for item in history]
        assert "parsed" in json.dumps(items)
        assert long.responses.create(input=items, max_output_tokens=16, **limits).usage
    ask: Any = {"role": "user", "content": "1+1="}
    for more in ({"response_format": Person}, {"tools": [tool], "tool_choice": "required"}):
        answer = long.chat.completions.parse(messages=[ask], max_tokens=600, **limits, **more).choices[0].message
        turns: Any = [ask, answer.model_dump(warnings=False), ask]
        assert "parsed" in turns[1]
        assert long.chat.completions.create(messages=turns, max_tokens=16, **limits).usage


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_required_tool_is_called(long: openai.OpenAI, choice: Any) -> None:
    response = long.responses.create(
        model=MODEL,
        input="1+1=",
        tools=[WEATHER],  # type: ignore[list-item]
        tool_choice=choice,
        parallel_tool_calls=False,
        max_output_tokens=600,
    )
    ((name, arguments),) = calls(response.output)
    assert (name, set(arguments), response.output_text) == ("weather", {"city"}, "")


def test_an_answer_without_text_has_an_empty_message(server: Server) -> None:
    first = server.chat("1+1=")["choices"][0]["message"]["content"][0]
    body = server.post("responses", input="1+1=", temperature=0, stop=first).json()
    assert [item["content"][0]["text"] for item in body["output"]] == [""]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "stores nothing, so send the whole conversation"),
        ({"conversation": {"id": "c"}}, "conversation", "stores nothing"),
        ({"background": True}, "background", "not supported"),
        ({"truncation": "auto"}, "truncation", "not supported"),
        ({"prompt": {"id": "p"}}, "prompt", "not supported"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", '"web_search"; expected "function"'),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function", "Unknown"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "Missing"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "needs a schema"),
        ({"text": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "text.format", "not"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "function_call_output"),
        ({"input": []}, "input", "at least 1 items"),
        ({"input": "x" * 10_000}, "input", "tokens"),
        (
            {"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{"}]},
            "input[0].arguments",
            "not JSON",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0]",
            "content part 1 of item 1 is an image",
        ),
    ],
)
def test_what_is_not_supported_is_refused(server: Server, body: dict[str, Any], param: str, words: str) -> None:
    response = server.post("responses", **{"input": "1+1=", **body})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert words in error["message"]


def test_an_error_in_a_stream_is_raised(bundle_long: Path, start: Start, endless: dict[str, int]) -> None:
    """After the failed response."""
    server = start(bundle_long, "--name", MODEL, "--slots", 1, "--timeout", 1).ready()
    *_, failed, error = stream(server, input="1+1=", logit_bias=endless)
    assert (failed[0], failed[1]["response"]["status"]) == ("response.failed", "failed")
    assert failed[1]["response"]["error"]["message"] == error[1]["error"]["message"]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        events = client.responses.create(
            model=MODEL, input="1+1=", stream=True, temperature=0, extra_body={"logit_bias": endless}
        )
        with pytest.raises(openai.APIError, match="time limit"):
            list(events)

"""Tool calls over HTTP: read from answers, enforced on request, and rendered into later prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import transformers

from axrun.serve.tools import Toolbox
from axrun.text.template import ChatTemplate, chat_ids
from axrun.text.tokenizer import Tokenizer
from tests.serve.server import Server, events

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 9}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather.", "parameters": PARAMETERS},
}
NOW: dict[str, Any] = {
    "type": "function",
    "function": {"name": "now", "parameters": {"type": "object", "maxProperties": 0}},
}
HOT = {"temperature": 1.5, "max_tokens": 500}
QUESTION = {"role": "user", "content": "What is the weather in Paris?"}
CALLED = [
    QUESTION,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}},
            {"id": "call_2", "type": "function", "function": {"name": "now", "arguments": ""}},
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "noon"}]},
]


def calls(message: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message["tool_calls"]]


def streamed(server: Server, text: str, **body: Any) -> tuple[str, list[dict[str, Any]], str]:
    """Content, tool calls put together from their deltas, and finish reason."""
    messages = [{"role": "user", "content": text}]
    with server.stream("chat/completions", messages=messages, **{"temperature": 0, **body}) as response:
        response.read()
        *chunks, done = events(response)
    assert done == "[DONE]"
    made: dict[int, dict[str, Any]] = {}
    content, finish = "", ""
    for choice in (chunk["choices"][0] for chunk in chunks):
        content += choice["delta"].get("content") or ""
        finish = choice["finish_reason"] or finish
        for delta in choice["delta"].get("tool_calls", []):
            call = made.setdefault(delta["index"], {"id": delta["id"], "function": {"name": "", "arguments": ""}})
            for key in ("name", "arguments"):
                call["function"][key] += delta["function"][key]
    return content, [made[index] for index in sorted(made)], finish


def test_calls_are_separated_from_the_text(server_saying: Server) -> None:
    (choice,) = server_saying.chat("c", tools=[WEATHER])["choices"]
    message = choice["message"]
    assert calls(message) == [("weather", {"city": "Paris"}), ("weather", {"city": "Rome, Italy"})]
    assert (message["content"], choice["finish_reason"]) == ("Let me see.", "tool_calls")
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    content, made, finish = streamed(server_saying, "c", tools=[WEATHER])
    assert (content, finish, calls({"tool_calls": made})) == ("Let me see.", "tool_calls", calls(message))


def test_only_one_call_if_parallel_calls_are_off(server_saying: Server) -> None:
    body = {"tools": [WEATHER], "parallel_tool_calls": False}
    assert calls(server_saying.chat("c", **body)["choices"][0]["message"]) == [("weather", {"city": "Paris"})]
    assert len(streamed(server_saying, "c", **body)[1]) == 1


@pytest.mark.parametrize("body", [{}, {"tools": [WEATHER], "tool_choice": "none"}, {"tools": [NOW]}])
def test_calls_of_other_tools_stay_text(server_saying: Server, body: dict[str, Any]) -> None:
    (choice,) = server_saying.chat("c", **body)["choices"]
    assert choice["message"]["content"].endswith("</tool_call>")
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "stop"
    assert streamed(server_saying, "c", **body) == (choice["message"]["content"], [], "stop")


def test_a_call_that_is_cut_off_stays_text(server_saying: Server) -> None:
    (choice,) = server_saying.chat("c", tools=[WEATHER], max_tokens=12)["choices"]
    assert choice["finish_reason"] == "length"
    assert "tool_calls" not in choice["message"]
    assert streamed(server_saying, "c", tools=[WEATHER], max_tokens=12)[0] == choice["message"]["content"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_required_tool_is_called_with_valid_arguments(server_long: Server, choice: Any) -> None:
    body = {"tools": [{**WEATHER, "function": {**WEATHER["function"], "strict": True}}], "tool_choice": choice}
    made = server_long.chat("1+1=", **body, **HOT, n=4, seed=3, parallel_tool_calls=False)["choices"]
    assert {each["finish_reason"] for each in made} == {"tool_calls"}
    for each in made:
        ((name, arguments),) = calls(each["message"])
        assert (name, each["message"]["content"]) == ("weather", None)
        jsonschema.validate(arguments, PARAMETERS)
    content, streams, finish = streamed(server_long, "1+1=", **{**body, **HOT}, seed=3, parallel_tool_calls=False)
    assert (content, finish) == ("", "tool_calls")
    assert calls({"tool_calls": streams}) == calls(made[0]["message"])


def test_a_schema_for_the_answer_and_tools(server_long: Server) -> None:
    """The answer follows the schema or calls a tool."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["red", "blue"]}}}
    made = server_long.chat("1+1=", tools=[NOW], response_format=form, **HOT, n=12, seed=1)["choices"]
    seen = set()
    for message in (choice["message"] for choice in made if choice["finish_reason"] != "length"):
        seen.add("call" if "tool_calls" in message else json.loads(message["content"]))
    assert {"call"} < seen <= {"call", "red", "blue"}


def test_earlier_calls_and_results_reach_the_model(server: Server) -> None:
    """The template of tiny-qwen2 does not support tools, so they are rendered as text."""
    shorter = server.post("chat/completions", messages=[QUESTION], max_tokens=1, temperature=0).json()
    told = server.post("chat/completions", messages=CALLED, max_tokens=1, temperature=0)
    assert told.status_code == 200, told.text
    assert told.json()["usage"]["prompt_tokens"] > shorter["usage"]["prompt_tokens"] + 40


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "names 'x'"),
        ({"tools": [NOW], "tool_choice": "sometimes"}, "tool_choice", 'expected one of "none", "auto", "required"'),
        ({"tools": [NOW, NOW]}, "tools", "Two tools have the name 'now'"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "web_search"),
        ({"tools": [NOW] * 129}, "tools", "at most 128"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
                "tool_choice": "required",
            },
            "tools",
            "uses not",
        ),
    ],
)
def test_bad_tools_are_refused_by_name(server: Server, body: dict[str, Any], param: str, words: str) -> None:
    error = server.post("chat/completions", messages=[QUESTION], **body)
    assert error.status_code == 400, error.text
    assert error.json()["error"]["param"] == param
    assert words in error.json()["error"]["message"]


@pytest.mark.parametrize("arguments", ["{", "[1]"])
def test_arguments_in_the_history_must_be_objects(server: Server, arguments: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    error = server.post("chat/completions", messages=[QUESTION, {"role": "assistant", "tool_calls": [call]}])
    assert error.status_code == 400
    assert error.json()["error"]["param"] == "messages[1].tool_calls[0].function.arguments"


# As Qwen2.5 writes tools, calls and results, shortened.
NATIVE = """{%- if tools %}<|im_start|>system
# Tools{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
<tool_call><|im_end|>
{% endif %}{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content %}{{ message.content }}{% endif %}{% for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_a_template_with_tools_gets_them_as_transformers_does(tiny_qwen2: Path) -> None:
    tokenizer, template = Tokenizer.open(tiny_qwen2), ChatTemplate(NATIVE, {})
    toolbox = Toolbox(template, tokenizer)
    tools = toolbox.tools_of({"tools": [WEATHER, NOW]})
    arguments: list[Any] = [{"city": "Paris"}, {}]
    given: list[dict[str, Any]] = [
        QUESTION,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": f"call_{number}", "function": {"name": name, "arguments": arguments[number]}}
                for number, name in enumerate(("weather", "now"))
            ],
        },
        {"role": "tool", "tool_call_id": "call_0", "content": "sunny"},
    ]
    messages, variables = toolbox.prompt(given, tools)
    assert (toolbox.name, toolbox.native) == ("hermes", True)
    reference: Any = transformers.AutoTokenizer.from_pretrained(tiny_qwen2)
    expected = reference.apply_chat_template(
        given, tools=[WEATHER, NOW], chat_template=NATIVE, add_generation_prompt=True, return_dict=False
    )
    assert chat_ids(tokenizer, template, messages, **variables) == list(expected)


def test_mistral_gets_ids_that_its_template_accepts(tiny_qwen2: Path) -> None:
    native = ChatTemplate("{{ tools | tojson }}[TOOL_CALLS]" + NATIVE, {})
    toolbox = Toolbox(native, Tokenizer.open(tiny_qwen2), "mistral")
    call = {"function": {"name": "f", "arguments": {}}}
    messages, _ = toolbox.prompt(
        [
            {"role": "assistant", "content": "", "tool_calls": [{**call, "id": "call_x"}, {**call, "id": "abcDEF123"}]},
            {"role": "tool", "tool_call_id": "call_x", "content": ""},
        ],
        None,
    )
    first, second = (each["id"] for each in messages[0]["tool_calls"])
    assert (first.isalnum(), len(first), second) == (True, 9, "abcDEF123")
    assert messages[1]["tool_call_id"] == first


def test_a_template_that_refuses_system_messages_gets_tools_in_the_question(tiny_qwen2: Path) -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{% endfor %}"
    )
    toolbox = Toolbox(ChatTemplate(source, {}), Tokenizer.open(tiny_qwen2))
    tools = toolbox.tools_of({"tools": [NOW]})
    messages, variables = toolbox.prompt([QUESTION], tools)
    assert ([message["role"] for message in messages], variables) == (["user"], {})
    assert '"name": "now"' in messages[0]["content"]
    assert messages[0]["content"].endswith(str(QUESTION["content"]))
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    messages, _ = toolbox.prompt([system, QUESTION], tools)
    assert messages[0]["content"].startswith("Be brief.\n\n# Tools")


@pytest.mark.parametrize("name", ["llama3", "nonsense"])
def test_the_format_can_be_given(server_saying: Server, bundle_saying: Path, start: Any, name: str) -> None:
    if name == "nonsense":
        with pytest.raises(AssertionError, match="--tool-format is 'nonsense', expected one of hermes"):
            start(bundle_saying, "--tool-format", name)
        return
    server = start(bundle_saying, "--tool-format", name, "--name", "qwen2").ready()
    assert "tool_calls" not in server.chat("c", tools=[WEATHER])["choices"][0]["message"]

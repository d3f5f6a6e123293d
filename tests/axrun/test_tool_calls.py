"""Tool calls in every format: read from streamed text, spelled again, and enforced by a grammar."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axrun.format.bundle import Bundle
from axrun.generate import Stats, generate
from axrun.model import Model
from axrun.sampling import Sampling
from axrun.sampling.grammar import Compiler
from axrun.sequence import Sequence
from axrun.text.template import ChatTemplate
from axrun.text.tokenizer import Tokenizer
from axrun.text.tool_formats import FORMATS, Call, format_of, reads_tools
from axrun.text.tool_grammar import grammar
from axrun.text.tool_stream import Part, ToolStream

NAMES = {"weather", "add", "ns.now"}
PARIS, SUM = Call("weather", {"city": "Paris", "days": 2}), Call("add", {"a": 1, "b": [True, None, "x"]})
# (format, answer of a model, its parts): forms that models and their documentation use
READ: list[tuple[str, str, list[Part]]] = [
    ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>', [PARIS]),
    (
        "hermes",
        'Let me see.\n<tool_call>{"name": "weather", "arguments": {"city": "Paris", "days": 2}}</tool_call>\n'
        '<tool_call>\n{"name":"add","arguments":{"a":1,"b":[true,null,"x"]}}\n</tool_call>\n',
        ["Let me see.", PARIS, SUM],
    ),
    ("hermes", '<tool_call>\n{"name": "ns.now"}', [Call("ns.now", {})]),  # the end mark is missing
    ("llama3", '{"name": "weather", "parameters": {"city": "Paris", "days": 2}}', [PARIS]),
    ("llama3", '<|python_tag|>{"name": "weather", "parameters": {"city": "Paris", "days": 2}}', [PARIS]),
    ("llama3", '{"name": "ns.now", "parameters": {}}; {"name": "ns.now", "parameters": {}}', [Call("ns.now", {})] * 2),
    ("llama3", '{"type": "function", "function": {"name": "ns.now", "arguments": {}}}', [Call("ns.now", {})]),
    ("mistral", '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris", "days": 2}}]', [PARIS]),
    ("json", '{"name": "add", "arguments": {"a": -1e999}}', [Call("add", {"a": -sys.float_info.max})]),
    ("mistral", 'So:[TOOL_CALLS][{"name": "ns.now", "arguments": {}}]', ["So:", Call("ns.now", {})]),
    ("mistral-args", '[TOOL_CALLS]weather[ARGS]{"city": "Paris", "days": 2}', [PARIS]),
    ("mistral-args", "[TOOL_CALLS]ns.now[ARGS]{}[TOOL_CALLS]ns.now[ARGS]{}", [Call("ns.now", {})] * 2),
    (
        "minicpm",
        "Thinking.<|tool_call_start|>\n```python\nweather(city='Paris', days=2)\nadd(a=1, b=[true, None, \"x\"])\n```\n"
        "<|tool_call_end|>",
        ["Thinking.", PARIS, SUM],
    ),
    ("gemma", "```tool_code\nprint(weather(city='Paris', days=2))\n```\nDone.", [PARIS, "\nDone."]),
    ("gemma", "```tool_code\n[ns.now(), ns.now(), ]\n```", [Call("ns.now", {})] * 2),
    ("json", ' [{"name": "weather", "arguments": {"city": "Paris", "days": 2}}]', [PARIS]),
]
# answers that are no calls, or not of a given tool
PLAIN = [
    ("hermes", "a <tool_cal> b <tool_call"),
    ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": \n</tool_call>'),
    ("hermes", '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call> and so on'),
    ("hermes", '<tool_call>\n{"name": "weather", "arguments": "Paris"}\n</tool_call>'),
    ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": NaN}}\n</tool_call>'),
    ("hermes", '<tool_call>{"name": "weather", "arguments": ' + '{"a":' * 3000 + "</tool_call>"),
    ("hermes", "<tool_call></tool_call>"),
    ("json", '{"city": "Paris"}'),
    ("json", "[1, 2]"),
    ("json", '{"name": "weather", "arguments": {}} as I said'),
    ("json", "Paris is {nice}."),
    ("llama3", "<|python_tag|>import os"),
    ("mistral", "[TOOL_CALLS] none"),
    ("mistral-args", "[TOOL_CALLS]weather{}"),
    ("minicpm", "<|tool_call_start|>weather(**{})<|tool_call_end|>"),
    ("gemma", "```tool_code\nweather('Paris')\n```"),
    ("gemma", "```tool_code\nweather(city=open('x'))\n```"),
    ("gemma", "```tool_code\nx = weather(city='x')\n```"),
    ("gemma", "```tool_code\nweather(city={1, 2})\n```"),
    ("gemma", "```tool_code\nweather(city=" + "(" * 3000 + "\n```"),
    ("gemma", "```python\nprint(1)\n```"),
]


def parts(name: str, text: str, step: int = 0, **options: Any) -> list[Part]:
    """The parts of an answer that arrives `step` characters at a time; neighbouring texts are joined."""
    stream = ToolStream(FORMATS[name], NAMES, **options)
    cuts = range(0, len(text), step or len(text) or 1)
    found = [part for at in cuts for part in stream.push(text[at : at + (step or len(text))])] + list(stream.finish())
    joined: list[Part] = []
    for part in found:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


@pytest.mark.parametrize("step", [0, 1, 7])
@pytest.mark.parametrize(("name", "text", "expected"), READ)
def test_calls_are_read_as_models_write_them(name: str, text: str, expected: list[Part], step: int) -> None:
    assert parts(name, text, step) == expected


@pytest.mark.parametrize("step", [0, 1, 7])
@pytest.mark.parametrize(("name", "text"), PLAIN)
def test_text_that_is_no_call_stays_text(name: str, text: str, step: int) -> None:
    assert parts(name, text, step) == [text]


def test_text_before_a_call_is_shown_at_once() -> None:
    stream = ToolStream(FORMATS["hermes"], NAMES)
    assert list(stream.push("One moment. <to")) == ["One moment."]
    assert list(stream.push("y>")) == [" <toy>"]
    assert list(ToolStream(FORMATS["llama3"], NAMES).push("Hello")) == ["Hello"]


def test_only_the_first_of_single_calls_counts() -> None:
    text = FORMATS["hermes"].write([PARIS, SUM])
    assert parts("hermes", text) == [PARIS, SUM]
    assert parts("hermes", text, single=True) == [PARIS]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
CALLS = st.builds(Call, st.sampled_from(sorted(NAMES)), st.dictionaries(st.sampled_from(["a", "b", "c"]), VALUES))


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_written_is_read_again(name: str) -> None:
    marks = [FORMATS[name].begin, FORMATS[name].end]

    @settings(max_examples=60, deadline=None)
    @given(st.lists(CALLS, min_size=1, max_size=3))
    def same(calls: list[Call]) -> None:
        text = FORMATS[name].write(calls)
        if not any(mark and mark in json.dumps(call.arguments) for call in calls for mark in marks):
            assert parts(name, text, 5) == calls

    same()


TOOLS: list[dict[str, Any]] = [
    {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 5}, "days": {"$ref": "#/$defs/count"}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"count": {"type": "integer", "minimum": 1, "maximum": 9}},
        },
    },
    {"name": "ns.now", "parameters": {"type": "object", "maxProperties": 0}},
]


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_the_grammar_makes_a_model_call(bundle_long: Path, name: str, single: bool) -> None:
    bundle = Bundle.open(bundle_long)
    tokenizer = Tokenizer.open(bundle.hf)
    made = Compiler(tokenizer, bundle.vocab_size).lark(grammar(FORMATS[name], TOOLS, tokenizer, single), "tools")
    ends = {token: 4.0 for character in '"})]' for token in tokenizer.encode(character, special=False)}
    ends.update(dict.fromkeys(tokenizer.stop_ids, 4.0))
    sequence, ended = Sequence(_model(bundle_long)), 0
    schemas = {tool["name"]: tool["parameters"] for tool in TOOLS}
    for seed in range(10):
        stats = Stats()
        sampling = Sampling(1.5, grammar=made, logit_bias=ends)
        ids = generate(sequence, tokenizer.encode("1+1="), sampling, 300, tokenizer.stop_ids, seed=seed, stats=stats)
        found = parts(name, tokenizer.decode([token.id for token in ids], special=True))
        if stats.stop == "eos":
            ended += 1
            assert found
            for call in found:
                assert isinstance(call, Call), found
                jsonschema.validate(call.arguments, schemas[call.name])
            assert len(found) == 1 or not single
    assert ended


_models: dict[Path, Model] = {}


def _model(path: Path) -> Model:
    if path not in _models:
        _models[path] = Model.load(Bundle.open(path))
    return _models[path]


def test_special_tokens_of_a_format_are_special_in_its_grammar(tiny_qwen2: Path) -> None:
    backend = Tokenizer.open(tiny_qwen2).backend
    backend.add_special_tokens(["[TOOL_CALLS]"])
    tokenizer = Tokenizer(backend, {639: ("test",)})
    (token,) = tokenizer.encode("[TOOL_CALLS]", special=False)
    mask = Compiler(tokenizer, token + 1).lark(grammar(FORMATS["mistral"], TOOLS, tokenizer, True), "tools").processor()
    logits = np.zeros(token + 1, np.float32)
    mask(logits, [], 0)
    assert [int(each) for each in np.flatnonzero(np.isfinite(logits))] == [token]


TEMPLATES = {
    "hermes": "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}<tool_call>{% endif %}",
    "llama3": "{% if tools %}Environment: ipython {{ tools | tojson }}{% endif %}",
    "mistral": "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}{{ '[TOOL_CALLS]' }}",
    "mistral-args": "{% if tools %}{{ tools | tojson }}{% endif %}{{ '[TOOL_CALLS]' + 'x' + '[ARGS]' }}",
    "minicpm": "{% if tools %}{{ tools | tojson }}{% endif %}{{ '<|tool_call_start|>' }}",
    "json": "{% if tools %}{{ tools | tojson }}{% endif %}",
}
TURNS = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_decides_the_format(name: str) -> None:
    template = ChatTemplate(TEMPLATES[name] + TURNS, {})
    assert (format_of(template), reads_tools(template)) == (name, True)


def test_a_template_without_tools_gets_the_most_common_format() -> None:
    for source in (TURNS, "{{ raise_exception('no') }}"):
        assert (format_of(ChatTemplate(source, {})), reads_tools(ChatTemplate(source, {}))) == ("hermes", False)

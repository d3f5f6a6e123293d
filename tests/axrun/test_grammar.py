"""Structured output: answers of a real model at a high temperature, validated by the jsonschema package."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from axrun.errors import BadInput, CheckFailed
from axrun.format.bundle import Bundle
from axrun.generate import Stats, generate
from axrun.model import Model
from axrun.sampling import Sampling
from axrun.sampling import grammar as grammars
from axrun.sampling.grammar import LARGEST, TOOLS, Compiler, rule
from axrun.sequence import Sequence
from axrun.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(bundle_fp32: Path) -> Tokenizer:
    return Tokenizer.open(Bundle.open(bundle_fp32).hf)


@pytest.fixture(scope="module")
def model(bundle_fp32: Path) -> Model:
    return Model.load(Bundle.open(bundle_fp32))


@pytest.fixture(scope="module")
def compiler(bundle_fp32: Path, tokenizer: Tokenizer) -> Compiler:
    return Compiler(tokenizer, Bundle.open(bundle_fp32).vocab_size)


def answers(
    model: Model, tokenizer: Tokenizer, grammar: grammars.Grammar, seeds: range, temperature: float = 1.5
) -> list[str]:
    """The answers that ended by themselves. At this temperature, few would without the bias."""
    prompt = tokenizer.encode("1+1=")
    ends = {token: 5.0 for character in '"]}' for token in tokenizer.encode(character, special=False)}
    sampling, ended = Sampling(temperature, grammar=grammar, logit_bias=ends), []
    sequence = Sequence(model)
    for seed in seeds:
        stats = Stats()
        made = generate(sequence, prompt, sampling, 120, tokenizer.stop_ids, seed=seed, stats=stats)
        ids = [token.id for token in made]
        assert tokenizer.special_ids.isdisjoint(ids)
        if stats.stop == "eos":
            ended.append(tokenizer.decode(ids, special=True))
    return ended


COUNT, WHOLE = st.integers(0, 4), st.integers(-300, 300)
REAL = st.floats(-50, 50, width=16)
SCALARS = st.one_of(st.none(), st.booleans(), WHOLE, REAL, st.text(max_size=9))
PATTERNS = st.sampled_from(["^a+b?$", "[0-9]{3}", "^(yes|no)$", r"^\w+@\w+$", "x"])
FORMATS = st.sampled_from(["date", "time", "date-time", "uuid", "ipv4", "email", "hostname", "duration", "uri"])
NAMES = st.sampled_from(["a", "b", "name", 'quote"d', "two words", "\u00e9", "minProperties", "const"])


def kind(name: str, **keywords: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A type with any of these keywords."""
    return st.fixed_dictionaries({"type": st.just(name)}, optional=keywords)


LEAVES = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["string", "null"]}, {}]),
    kind("integer", minimum=WHOLE, maximum=WHOLE, multipleOf=st.integers(1, 9)),
    kind("integer", exclusiveMinimum=WHOLE, exclusiveMaximum=WHOLE),
    kind("number", minimum=REAL, exclusiveMaximum=REAL),
    kind("string", minLength=COUNT, maxLength=COUNT),
    kind("string", pattern=PATTERNS),
    kind("string", format=FORMATS),
    st.fixed_dictionaries({"const": SCALARS | st.lists(SCALARS, max_size=3)}),
    st.fixed_dictionaries({"enum": st.lists(SCALARS, min_size=1, max_size=4)}),
)


@st.composite
def objects(draw: Any, inner: st.SearchStrategy[Any]) -> dict[str, Any]:
    made = {"type": "object", "properties": draw(st.dictionaries(NAMES, inner, max_size=3))}
    made["required"] = draw(st.lists(st.sampled_from(sorted(made["properties"]) or ["a"]), unique=True, max_size=3))
    return {**made, **draw(st.sampled_from([{}, {"additionalProperties": False}, {"maxProperties": 2}]))}


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        objects(inner),
        kind("array", items=inner, minItems=COUNT, maxItems=COUNT),
        several.map(lambda items: {"type": "array", "prefixItems": items, "items": False}),
        several.map(lambda options: {"anyOf": options}),
        several.map(lambda options: {"oneOf": options}),
        st.lists(objects(inner), min_size=1, max_size=2).map(lambda parts: {"allOf": parts}),
        st.builds(lambda one, two: {"$defs": {"x": one}, "type": "array", "items": two, "maxItems": 3}, inner, inner),
        inner.map(lambda one: {"type": "object", "additionalProperties": one, "maxProperties": 2}),
        inner.map(lambda one: {"type": "object", "patternProperties": {"^a": one}, "additionalProperties": False}),
    )


SCHEMAS = st.recursive(LEAVES, containers, max_leaves=6)


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.system)])
def test_every_complete_answer_is_valid(model: Model, tokenizer: Tokenizer, compiler: Compiler, count: int) -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(SCHEMAS)
    def valid(schema: dict[str, Any]) -> None:
        try:
            grammar = compiler.schema(schema)
        except BadInput as error:
            seen["refused" if "the schema" in str(error) else f"unexpected: {error}"] += 1
            return
        checker = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
        for text in answers(model, tokenizer, grammar, range(3)):
            checker.validate(json.loads(text))
            seen["valid"] += 1
        seen["schemas"] += 1

    valid()
    assert not [key for key in seen if key.startswith("unexpected")], seen
    assert seen["schemas"] > 0.7 * count, seen
    assert seen["valid"] > seen["schemas"], seen


def test_a_grammar_is_followed(model: Model, tokenizer: Tokenizer, compiler: Compiler) -> None:
    grammar = compiler.lark('start: ("yes" | "no") ", because " /[a-z ]{3,9}/ "."')
    texts = answers(model, tokenizer, grammar, range(8))
    assert len(set(texts)) > 4
    assert all(re.fullmatch("(yes|no), because [a-z ]{3,9}[.]", text) for text in texts)


def test_answers_share_a_compiled_grammar_but_no_state(model: Model, tokenizer: Tokenizer, compiler: Compiler) -> None:
    grammar = compiler.schema({"enum": ["red", "green", "blue"]})
    assert compiler.schema({"enum": ["red", "green", "blue"]}) is grammar
    assert {json.loads(text) for text in answers(model, tokenizer, grammar, range(60))} == {"red", "green", "blue"}


def test_only_stop_tokens_follow_a_complete_answer(tokenizer: Tokenizer, compiler: Compiler) -> None:
    """Special tokens and ids without a token never continue an answer; every stop token ends it."""
    ids = tokenizer.encode("a", special=False)
    mask = compiler.lark("start: /a+/").processor()
    for answer in ([], ids):
        logits = np.zeros(640, np.float32)
        mask(logits, [5, *answer], 1)
        kept = {int(token) for token in np.flatnonzero(np.isfinite(logits))}
        texts = {tokenizer.token_bytes(token).decode() for token in kept - tokenizer.stop_ids}
        assert kept & tokenizer.special_ids == (tokenizer.stop_ids if answer else set())
        assert texts
        assert all(text.strip("a") == "" for text in texts)


def test_a_grammar_can_begin_behind_a_token(tokenizer: Tokenizer, compiler: Compiler) -> None:
    mark, a = (tokenizer.encode(text, special=False)[0] for text in "!a")
    mask = compiler.lark("start: /a+/").behind(mark).processor()
    for answer, free in (([], True), ([5, a], True), ([5, a, mark], False), ([5, a, mark, a], False)):
        logits = np.zeros(640, np.float32)
        mask(logits, [mark, *answer], 1)
        assert np.isfinite(logits).all() == free
        assert np.isfinite(logits[a])


def test_an_answer_that_left_the_grammar_is_an_error(tokenizer: Tokenizer, compiler: Compiler) -> None:
    mask = compiler.lark('start: "yes"').processor()
    with pytest.raises(CheckFailed, match="cannot be followed further"):
        mask(np.zeros(640, np.float32), tokenizer.encode("no", special=False), 0)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "array", "uniqueItems": True}, "uses uniqueItems, which is not supported"),
        ({"if": {"type": "string"}, "then": {"minLength": 2}}, "uses if, then"),
        ({"type": "object", "properties": {"a": {"not": {}}}}, "uses not"),
        ({"type": "string", "format": "weird"}, "uses format 'weird'"),
        ({"type": "string", "pattern": "(?=a)b"}, "its pattern: .*look-ahead"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "its oneOf: "),
        ({"$ref": "http://example.org/schema"}, "its \\$ref: "),
        ({"$ref": "#/$defs/missing"}, "its \\$ref: "),
        ({"enum": ["\ud800"]}, "half a UTF-16 surrogate pair"),
        ({"const": ["0\x1f"]}, "control character .*u001f"),
        ({"enum": ["\x7f"]}, "control character .*u007f"),
        ({"type": "stringg"}, "its type: .*stringg"),
        ({"type": "object", "minProperties": 2}, "uses minProperties"),
        (
            {"type": "object", "properties": {"properties": {"type": "object", "minProperties": 1}}},
            "uses minProperties",
        ),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "minimum"),
        ({"type": "integer", "minimum": 5, "maximum": 6, "multipleOf": 4}, "multiple of 4"),
        ({"enum": ["x" * LARGEST]}, f"at most {LARGEST}"),
        (json.loads('{"items":' * 101 + "{}" + "}" * 101), "nested deeper than 100"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused(compiler: Compiler, schema: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        compiler.schema(schema)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (
            {"type": "string", "pattern": "(?=a)b"},
            r"the schema cannot be enforced: its pattern: .*look-behind, is not ",
        ),
        ({"type": "string", "format": "weird"}, "the schema uses format 'weird', which is not supported; leave it out"),
        ({"type": "object", "$ref": "#"}, "the schema cannot be enforced: its \\$ref: circular references .*#"),
        ({"type": "integer", "minimum": 5, "maximum": 1}, r"the schema cannot be enforced: Unsat.* than maximum \(1\)"),
    ],
)
def test_a_schema_inside_a_grammar_gives_the_same_reason(
    compiler: Compiler, schema: dict[str, Any], words: str
) -> None:
    """Without the lines of the grammar, which the client has not written."""
    with pytest.raises(BadInput) as refused:
        compiler.lark(f"start: call\ncall: /x/ it\nit: {rule(schema)}\n", TOOLS)
    assert re.fullmatch(f"{words}[a-z]*", str(refused.value))


@pytest.mark.parametrize("value", ["\\u001f", "\n\t\x08", "\u0085\u00e9\u2028"])
def test_other_characters_of_a_constant_are_kept(
    model: Model, tokenizer: Tokenizer, compiler: Compiler, value: str
) -> None:
    texts = answers(model, tokenizer, compiler.schema({"const": value}), range(3))
    assert texts
    assert {json.loads(text) for text in texts} == {value}


def test_property_names_are_no_keywords(compiler: Compiler) -> None:
    compiler.schema({"type": "object", "properties": {"minProperties": {"type": "integer"}, "not": {"type": "null"}}})


OPEN = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("schema", "open"),
    [
        (OPEN, False),
        ({**OPEN, "additionalProperties": True}, True),
        ({**OPEN, "required": ["a", "b"]}, True),
        ({"anyOf": [OPEN, {"type": "null"}]}, False),
        ({"$defs": {"x": OPEN}, "$ref": "#/$defs/x", "description": "annotations are no schemas"}, False),
        ({"allOf": [OPEN, {"type": "object", "required": ["b"], "properties": {"b": {"type": "integer"}}}]}, True),
        ({**OPEN, "anyOf": [{"required": ["b"]}, {"required": ["c"]}]}, True),
    ],
)
def test_objects_get_no_properties_that_the_schema_does_not_name(
    tokenizer: Tokenizer, compiler: Compiler, schema: dict[str, Any], open: bool
) -> None:
    """Unless it says so, or several schemas apply to one object. All are valid JSON Schema of open objects."""
    text = '{"a":1,"b":2}'
    assert jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))
    ids = tokenizer.encode(text, special=False)
    assert (compiler.schema(schema)._matcher.deep_copy().try_consume_tokens(ids) == len(ids)) == open


def test_keys_cannot_evade_a_schema_by_escapes(tokenizer: Tokenizer, compiler: Compiler) -> None:
    """llguidance alone accepts this key as one that the schema does not name, at least in version 1.9.1."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    ids = tokenizer.encode('{"\\u0061":"x"}', special=False)
    made = LLMatcher(compiler._vocabulary, LLMatcher.grammar_from_json_schema(schema))
    assert made.try_consume_tokens(ids) == len(ids)
    matcher = compiler.schema(schema)._matcher.deep_copy()
    assert matcher.try_consume_tokens(ids) < len(ids)


@pytest.mark.parametrize("text", ["start: missing", "begin: 'a'", 'start: "a', "x" * (LARGEST + 1)])
def test_an_invalid_grammar_is_refused(compiler: Compiler, text: str) -> None:
    with pytest.raises(BadInput, match=r"the grammar (is invalid: |has )"):
        compiler.lark(text)


def test_a_model_without_stop_tokens_is_refused(tokenizer: Tokenizer) -> None:
    endless = Compiler(Tokenizer(tokenizer.backend, {}), 640)
    with pytest.raises(BadInput, match="needs a stop token"):
        endless.schema({"type": "string"})


def test_a_missing_library_is_named(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(BadInput, match=r"needs llguidance.*\n.*axrun\[grammar\]"):
        compiler.lark('start: "not compiled before"')

"""Our validator compared with jsonschema-rs, on the request schemas."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axrun.serve.errors import ApiError
from axrun.serve.field_kinds import request
from axrun.serve.openapi import document
from axrun.serve.routes import WRITING
from axrun.serve.validate import LIMITS, parse, validate

SCHEMAS = {path: request(endpoint.fields, "m") for path, endpoint in WRITING.items()}

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 130),
    st.sampled_from([0.5, 1.0, 2.5, -2.0, 1e300, (1 << 31) - 1, 1 << 31, 1 << 63, -(1 << 63)]),
    st.sampled_from(["", "m", "text", "user", "system", "auto", "x" * 256, "x" * 257, "7", "text "]),
)
NAMES = sorted(
    {"type", "text", "role", "content", "name", "include_usage", "model", "5", "x", "1234567890"}
    | {name for endpoint in WRITING.values() for name in endpoint.fields}
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)


def bodies(name: str) -> st.SearchStrategy[Any]:
    """Mostly nearly valid bodies: the required fields, plus a few others with any value."""
    content = st.one_of(st.just("hi"), VALUES, st.lists(st.just({"type": "text", "text": "hi"}), max_size=2))
    message = st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "robot"]), "content": content})
    first = {
        "messages": st.lists(message, max_size=2) | VALUES,
        "prompt": VALUES | st.lists(st.integers(-1, 5), max_size=3),
        "input": st.just("hi") | st.lists(message, max_size=2) | VALUES,
    }
    valid: dict[str, st.SearchStrategy[Any]]
    valid = {"model": st.just("m"), **{field: first[field] for field in first.keys() & WRITING[name].fields.keys()}}
    others = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3)
    return st.one_of(VALUES, st.builds(lambda one, two: {**two, **one}, st.fixed_dictionaries(valid), others))


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_validation_agrees_with_jsonschema(name: str) -> None:
    reference = jsonschema_rs.validator_for(SCHEMAS[name])
    seen = set()

    @settings(deadline=None, max_examples=300)
    @given(bodies(name))
    def agree(value: Any) -> None:
        valid = reference.is_valid(value)
        seen.add(valid)
        if valid:
            validate(value, SCHEMAS[name])
        else:
            with pytest.raises(ApiError):
                validate(value, SCHEMAS[name])

    agree()
    assert seen == {True, False}


def keywords(value: Any) -> set[str]:
    """Every keyword of a schema, at any depth."""
    if not isinstance(value, dict):
        return set()
    below = [value.get("items"), value.get("additionalProperties"), *value.get("anyOf", [])]
    below += value.get("properties", {}).values()
    return set(value) | {word for inner in below for word in keywords(inner)}


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_all_keywords_in_the_schemas_are_supported(name: str) -> None:
    checked = {
        "type",
        "anyOf",
        "items",
        "properties",
        "required",
        "additionalProperties",
        "propertyNames",
        "default",
        *LIMITS,
    }
    assert keywords(SCHEMAS[name]) <= checked | {"title", "description", "x-refused"}


def test_the_openapi_document_is_valid() -> None:
    for each in SCHEMAS.values():
        jsonschema_rs.meta.validate(each)
    given = json.loads(json.dumps(document("m")))
    assert given["openapi"] == "3.1.0"
    for part in given["components"]["schemas"].values():
        jsonschema_rs.meta.validate(part)


def test_validation_normalises_values() -> None:
    given = {"model": "m", "prompt": [1.0, 2], "max_tokens": 5.0, "temperature": 1, "stop": None, "seed": None}
    seen = validate(given, SCHEMAS["/v1/completions"])
    assert seen == {"model": "m", "prompt": [1, 2], "max_tokens": 5, "temperature": 1}
    assert validate({"prompt": "x"}, SCHEMAS["/v1/completions"])["max_tokens"] == 16
    assert "max_tokens" not in validate({"prompt": "x", "max_tokens": None}, SCHEMAS["/v1/completions"])
    assert all(type(token) is int for token in seen["prompt"])
    assert type(seen["max_tokens"]) is int


def test_parse_accepts_only_json() -> None:
    assert parse('{"a": [1, 2.5, "\u20ac", null, true]}'.encode()) == {"a": [1, 2.5, "\u20ac", None, True]}
    for body in (b"NaN", b"{'a': 1}", b'{"a": 1,}', b"\xef\xbb\xbf{}", b'"\x01"'):
        with pytest.raises(ApiError, match="not JSON"):
            parse(body)


def test_parse_bounds_what_others_read() -> None:
    assert parse(b"1e308") == 1e308
    for body, words in (
        (b"1e999", "1e999 is too large"),
        (b"[" * 100_000, "nested deeper than 200"),
        (b"[" * 200 + b"{}" + b"]" * 200, "nested deeper than 200"),
    ):
        with pytest.raises(ApiError, match=words):
            parse(body)
    assert parse(b"[" * 199 + b"{}" + b"]" * 199)

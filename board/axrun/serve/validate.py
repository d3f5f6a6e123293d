"""Validation of JSON against the part of JSON Schema that `axrun.serve.schema` and its neighbours use.

https://json-schema.org/draft/2020-12/json-schema-validation. In addition to the standard
keywords, `x-refused` marks a field that is known but not supported, and says what to do: only values that turn it off
are valid.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from axrun.serve.errors import ApiError, invalid

Schema = Mapping[str, Any]

WORDS = {
    "null": "null",
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "a string",
    "array": "a list",
    "object": "an object",
}

HALF = re.compile(r"\\u[dD][89a-fA-F]")  # JSON's spelling of half a surrogate pair, or of a pair
DIGITS = 309  # of a whole number that float64 can hold
LEVELS = 200  # of objects and lists in a body: what reads them recursively stays within Python's stack
CONTAINERS = {"null": type(None), "string": str, "array": list, "object": dict}

# keyword: (types it applies to, predicate, description of the expected value)
LIMITS: dict[str, tuple[Any, Callable[[Any, Any], bool], str]] = {
    "minimum": ((int, float), lambda value, limit: value >= limit, "at least {}"),
    "maximum": ((int, float), lambda value, limit: value <= limit, "at most {}"),
    "minLength": (str, lambda value, limit: len(value) >= limit, "at least {} characters"),
    "maxLength": (str, lambda value, limit: len(value) <= limit, "at most {} characters"),
    "minItems": (list, lambda value, limit: len(value) >= limit, "at least {} items"),
    "maxItems": (list, lambda value, limit: len(value) <= limit, "at most {} items"),
    "maxProperties": (dict, lambda value, limit: len(value) <= limit, "at most {} entries"),
    "enum": (object, lambda value, allowed: value in allowed, "{}"),
}


def parse(body: bytes) -> Any:
    """Parses a request body.

    Raises ApiError if it is not UTF-8 or not JSON, contains NaN, an infinity or a number beyond float64, is nested
    deeper than LEVELS, or has text with half a surrogate pair.
    """
    try:
        text = body.decode("utf-8")
        given = json.loads(text, parse_constant=_not_a_number, parse_float=_finite, parse_int=_whole)
    except UnicodeDecodeError as error:
        raise invalid(f"The body is not UTF-8 at byte {error.start}.", code="invalid_json") from None
    except ValueError as error:
        raise invalid(f"The body is not JSON: {error}.", code="invalid_json") from None
    except RecursionError:
        raise _deep() from None
    if _deeper(given, LEVELS):
        raise _deep()
    if HALF.search(text):
        _expect_characters(given, "")
    return given


def validate(value: Any, schema: Schema, name: str = "") -> Any:
    """Returns the value with integral floats as integers, null properties removed and defaults filled in.

    Properties that no schema describes stay as they are.

    Raises ApiError naming the first invalid property, its value and the expected one.
    """
    if "anyOf" in schema:
        return _any_of(value, schema, name)
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not any(_is(value, kind) for kind in types):
        raise _wrong(value, schema, name, " or ".join(WORDS[kind] for kind in types if kind != "null"))
    if isinstance(value, float) and "number" not in types:
        value = int(value)
    for keyword, (about, fits, words) in LIMITS.items():
        if keyword in schema and isinstance(value, about) and not fits(value, schema[keyword]):
            bound = schema[keyword]
            raise _wrong(value, schema, name, words.format(_listed(bound) if keyword == "enum" else bound))
    if isinstance(value, list) and "items" in schema:
        return [validate(item, schema["items"], f"{name}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, dict):
        return _object(value, schema, name)
    return value


def _object(value: dict[str, Any], schema: Schema, name: str) -> dict[str, Any]:
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    inside = f"{name}." if name else ""
    checked = {}
    for key, entry in value.items():
        path = inside + ascii(key[:40])[1:-1]
        if key not in properties and others is False:
            raise invalid(f"Unknown parameter: '{path}'.", path, "unknown_parameter")
        if "propertyNames" in schema:
            _expect_name(key, schema["propertyNames"], name, path)
        rule = properties.get(key, others)
        entry = entry if rule is True else validate(entry, rule, path)
        if entry is not None or rule is True:
            checked[key] = entry
    for key in schema.get("required", ()):
        if key not in value:
            raise invalid(f"Missing required parameter: '{inside}{key}'.", inside + key, "missing_required_parameter")
    defaults = {key: rule["default"] for key, rule in properties.items() if "default" in rule and key not in value}
    return {**defaults, **checked}


def _expect_name(key: str, rule: Schema, name: str, path: str) -> None:
    if not re.fullmatch(rule["pattern"], key):
        raise invalid(f"{name} has the key {_short(key)}; expected {rule['title']}.", path, "invalid_value")


def _any_of(value: Any, schema: Schema, name: str) -> Any:
    fitting = [
        option
        for option in schema["anyOf"]
        for kind in (option["type"] if isinstance(option["type"], list) else [option["type"]])
        if _is(value, kind)
    ]
    if isinstance(value, dict) and len(fitting) > 1:
        fitting = [_meant(value, fitting)]
    for option in fitting:
        try:
            return validate(value, option, name)
        except ApiError:
            if len(fitting) == 1:
                raise
    raise _wrong(value, schema, name, schema["title"])


def _meant(value: dict[str, Any], options: list[Schema]) -> Schema:
    """Selects an object schema by the property whose allowed values differ between the options (discriminator)."""
    key = next(key for key, rule in options[0]["properties"].items() if "enum" in rule)
    for option in options:
        if value.get(key) in option["properties"][key]["enum"]:
            return option
    allowed = [each for option in options for each in option["properties"][key]["enum"]]
    rule = {**options[0]["properties"][key], "enum": allowed}
    return {"type": "object", "required": [key], "properties": {key: rule}}


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if isinstance(value, (int, float)):
        whole = isinstance(value, int) or (math.isfinite(value) and value.is_integer())
        return (kind == "number" and (isinstance(value, int) or math.isfinite(value))) or (kind == "integer" and whole)
    return type(value) is CONTAINERS.get(kind)


def _wrong(value: Any, schema: Schema, name: str, expected: str) -> ApiError:
    name = name or "The body"
    if schema.get("x-refused"):
        return invalid(f"{name} is not supported by this server; {schema['x-refused']}.", name, "unsupported_parameter")
    return invalid(f"{name} is {_short(value)}; expected {expected}.", name, "invalid_value")


def _short(value: Any) -> str:
    if isinstance(value, (list, dict)) and value:
        return f"a {'list' if isinstance(value, list) else 'object'} of {len(value)}"
    text = json.dumps(value) if not isinstance(value, int) or abs(value) < 1 << 64 else "a very large number"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _not_a_number(constant: str) -> Any:
    raise ValueError(f"{constant} is not a JSON number")


def _listed(allowed: list[Any]) -> str:
    words = [json.dumps(value) for value in allowed if value is not None]
    return words[0] if len(words) == 1 else f"one of {', '.join(words)}"


def _expect_characters(value: Any, path: str) -> None:
    """Raises ApiError naming the first text that has half a surrogate pair."""
    if isinstance(value, str):
        half = next((char for char in value if "\ud800" <= char <= "\udfff"), None)
        if half is not None:
            words = f"{path or 'The body'} has {half!a}, half of a surrogate pair, which is not a character."
            raise invalid(words, path or None, "invalid_value")
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            _expect_characters(entry, f"{path}[{index}]")
    elif isinstance(value, dict):
        for key, entry in value.items():
            _expect_characters(key, path)
            _expect_characters(entry, (f"{path}." if path else "") + ascii(key[:40])[1:-1])


def _whole(text: str) -> int:
    if len(text) > DIGITS:
        raise invalid(f"A number has {len(text)} digits; expected at most {DIGITS}.", code="invalid_json")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise invalid(f"The number {text:.40} is too large; expected at most 1.8e308.", code="invalid_json")
    return number


def _deep() -> ApiError:
    return invalid(f"The body is nested deeper than {LEVELS} levels.", code="invalid_json")


def _deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested in more than `levels` levels."""
    level = [value] if isinstance(value, (dict, list)) else []
    while level and levels:
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level, levels = [each for entries in inner for each in entries if isinstance(each, (dict, list))], levels - 1
    return bool(level)

"""Structured output: only tokens that continue a JSON schema or a grammar can be sampled.

llguidance (https://github.com/guidance-ai/llguidance) computes the masks. It is an extra, `axrun[grammar]`, and is
imported for the first request that needs it.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from axrun.errors import BadInput, CheckFailed

if TYPE_CHECKING:
    from axrun.text.tokenizer import Tokenizer

LARGEST = 1 << 16  # characters of a schema or grammar: 2000 optional properties take a second to compile
CACHED = 32  # compiled grammars to keep
NESTED = 100  # levels of a schema
OPTIONS = {
    "lenient": False,  # refuse keywords that are not implemented
    "whitespace_pattern": r"\n?[ \t]{0,20}",  # unlimited whitespace would let a model pad for ever
    # With \u, a key could spell the name of another property: {"\u0061": ...} for {"a": ...}.
    "json_allowed_escapes": 'nrbtf\\"',
}
SCHEMA, GRAMMAR, TOOLS = "schema", "grammar", "tools"
NAMED = ("properties", "patternProperties", "$defs", "definitions")  # keywords that map names to schemas
OBJECT = ("properties", "required", "additionalProperties", "patternProperties")  # keywords of objects
VALUES = ("const", "enum", "default", "examples")  # keywords with values, not schemas
# an escape in JSON; llguidance drops these from const and enum, since \\u is not among the allowed escapes
CONTROL = re.compile(r"(?<!\\)(?:\\\\)*(\\u00(?:[01][0-9a-f]|7f))")
SURROGATE = re.compile("[\ud800-\udfff]")
UNIMPLEMENTED = re.compile(r"Unimplemented keys: (\[[^\]]*\])")
UNKNOWN_FORMAT = re.compile(r"Unknown format: (\S*)")
# what a message has around that about a schema inside a grammar: its place, and the lines of the grammar
INSIDE, LISTING = re.compile(r"\Aat \d+\(\d+\): failed to compile JSON schema: "), re.compile(r"\n +1 \| .*", re.DOTALL)
# beginning of a message of llguidance: the keyword it is about
KEYWORDS = {
    "regex parse error": "pattern",
    "oneOf": "oneOf",
    "Resource": "$ref",
    "Pointer": "$ref",
    "circular references": "$ref",
    "Invalid type": "type",
}


class Grammar:
    """A compiled grammar, shared by the answers that follow it. `stops` are the stop tokens; it knows the first one.

    `after`: the answer follows it only behind this token.
    """

    def __init__(self, matcher: Any, stops: Sequence[int], after: int | None = None) -> None:
        self._matcher, self._stops, self._after = matcher, stops, after

    def behind(self, token: int) -> Grammar:
        """The same grammar for what follows a token."""
        return Grammar(self._matcher, self._stops, token)

    def processor(self) -> Mask:
        """The logits processor of one answer."""
        return Mask(self._matcher.deep_copy(), self._stops, self._after)


class Mask:
    """Excludes the tokens that do not continue the grammar. Once it is complete, only stop tokens remain."""

    def __init__(self, matcher: Any, stops: Sequence[int], after: int | None = None) -> None:
        self._matcher, self._stops, self._after = matcher, list(stops), after
        self._taken = 0

    def __call__(self, logits: NDArray[np.float32], ids: Sequence[int], start: int) -> None:
        """A logits processor. Raises CheckFailed if llguidance reaches one of its limits."""
        if self._after is not None:
            answer = list(ids[start:])
            if self._after not in answer:
                return
            self._taken, self._after = answer.index(self._after) + 1, None
        new = list(ids[start + self._taken :])
        self._taken += len(new)
        if not (new and not self._matcher.consume_tokens(new)):
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            if not self._matcher.is_error():
                excluded = np.unpackbits(~bits, count=len(logits), bitorder="little").view(np.bool_)
                excluded[self._stops] = excluded[self._stops[0]]
                np.copyto(logits, np.float32(-np.inf), where=excluded)
                return
        raise CheckFailed(f"the grammar cannot be followed further: {_line(self._matcher.get_error())}")


class Compiler:
    """Compiles JSON schemas and grammars for the vocabulary of a model. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._stops = sorted(token for token in tokenizer.stop_ids if token < vocab_size)
        self._lock = threading.Lock()
        self._compiled = functools.lru_cache(maxsize=CACHED)(self._compile)

    def schema(self, schema: Mapping[str, Any]) -> Grammar:
        """The grammar of the JSON values that are valid under a schema.

        Raises BadInput for a schema that cannot be enforced, naming the keyword.
        """
        text = json.dumps(_enforceable(schema))
        if len(text) > LARGEST:
            raise BadInput(f"the schema has {len(text)} characters, expected at most {LARGEST}")
        return self._compiled(SCHEMA, text)

    def lark(self, text: str, kind: str = GRAMMAR) -> Grammar:
        """Raises BadInput for an invalid grammar.

        https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
        """
        if len(text) > LARGEST:
            raise BadInput(f"the grammar has {len(text)} characters, expected at most {LARGEST}")
        return self._compiled(kind, text)

    def _compile(self, kind: str, text: str) -> Grammar:
        library = _library()
        matcher: Any = library.LLMatcher
        if kind == SCHEMA:
            try:
                text = matcher.grammar_from_json_schema(text, overrides=OPTIONS)
            except ValueError as error:  # JSON that llguidance cannot read, e.g. an integer beyond float64
                raise BadInput(_reason(kind, str(error))) from None
        else:
            text = matcher.grammar_from_lark(text)
        made = matcher(self._vocabulary, text, log_level=0)
        if not made.is_error():
            made.compute_bitmask()  # finds out that nothing fits, and prepares the first token
        if made.is_error():
            raise BadInput(_reason(kind, made.get_error()))
        return Grammar(made, self._stops)

    @property
    def _vocabulary(self) -> Any:
        with self._lock:
            return self._made

    @functools.cached_property
    def _made(self) -> Any:
        """About a second for 150 000 tokens."""
        if not self._stops:
            raise BadInput("structured output needs a stop token, and this model has none")
        library = _library()
        wrapped = library.TokenizerWrapper(_Tokens(self._tokenizer, self._vocab_size, self._stops))
        return library.LLTokenizer(wrapped, n_vocab=self._vocab_size)


class _Tokens:
    """A tokenizer as llguidance expects it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stops: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = stops[0]
        self.tokens = [tokenizer.token_bytes(token) for token in range(vocab_size)]
        self.special_token_ids = [token for token in sorted(tokenizer.special_ids.union(stops)) if token < vocab_size]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode_after(text)


def rule(schema: Mapping[str, Any]) -> str:
    """A schema inside a Lark grammar. Raises BadInput as `Compiler.schema`."""
    return "%json " + json.dumps({**_enforceable(schema), "x-guidance": OPTIONS})


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise BadInput(
            f"structured output needs llguidance, which cannot be imported: {error}\n"
            "Install it with Python 3.10 or newer: pip install 'axrun[grammar]'"
        ) from None
    return llguidance


def _enforceable(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema for llguidance. Raises BadInput for what it accepts without guaranteeing it.

    Objects with `properties` and without `additionalProperties` get no others: a small model would add more and more.
    """
    _expect_levels(schema)
    if half := SURROGATE.search(json.dumps(schema, ensure_ascii=False)):
        raise BadInput(f"the schema has {half[0]!a}, half a UTF-16 surrogate pair, which is not a character")
    if control := CONTROL.search(json.dumps(schema)):
        raise BadInput(f"the schema has the control character {control[1]}, which is not supported; leave it out")
    closed: Mapping[str, Any] = _closed(schema) if not _combines(schema) else schema
    _expect_enforceable(closed)
    return closed


def _subschemas(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The keywords whose values are or hold schemas, with the values."""
    yield from ((key, value) for key, value in schema.items() if key not in VALUES)


def _expect_levels(value: Any, level: int = 0) -> None:
    if level > NESTED:
        raise BadInput(f"the schema is nested deeper than {NESTED} levels")
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        _expect_levels(inner, level + 1)


def _combines(schema: Any) -> bool:
    """Whether several schemas apply to one object, so that none of them knows all of its properties."""
    if isinstance(schema, list):
        return any(map(_combines, schema))
    if not isinstance(schema, Mapping):
        return False
    combined = any(key in schema for key in ("anyOf", "oneOf", "$ref")) and any(key in schema for key in OBJECT)
    inner = (
        list(value.values()) if key in NAMED and isinstance(value, Mapping) else value
        for key, value in _subschemas(schema)
    )
    return "allOf" in schema or combined or any(map(_combines, inner))


def _closed(schema: Any) -> Any:
    """A copy in which objects have no other properties than those that are named."""
    if isinstance(schema, list):
        return list(map(_closed, schema))
    if not isinstance(schema, Mapping):
        return schema
    made = {key: value for key, value in schema.items() if key in VALUES}
    for key, value in _subschemas(schema):
        named = key in NAMED and isinstance(value, Mapping)
        made[key] = {name: _closed(each) for name, each in value.items()} if named else _closed(value)
    properties, required = schema.get("properties"), schema.get("required", [])
    others = {"additionalProperties", "patternProperties"}.intersection(schema)
    known = (
        isinstance(properties, Mapping) and isinstance(required, list) and set(map(str, required)) <= set(properties)
    )
    if properties and known and not others:
        made["additionalProperties"] = False
    return made


def _expect_enforceable(schema: Any) -> None:
    if isinstance(schema, list):
        for entry in schema:
            _expect_enforceable(entry)
    if not isinstance(schema, Mapping):
        return
    least, required = schema.get("minProperties"), schema.get("required", ())
    counted = isinstance(least, (int, float)) and isinstance(required, (list, tuple)) and least > len(required)
    if counted and (schema.get("additionalProperties") is not False or "patternProperties" in schema):
        # keys that the schema does not name may repeat
        raise BadInput("the schema uses minProperties, which is enforced only with additionalProperties false")
    for key, entry in schema.items():
        if key in NAMED and isinstance(entry, Mapping):
            entry = list(entry.values())
        if key not in VALUES:
            _expect_enforceable(entry)


def _reason(kind: str, message: str) -> str:
    if message.startswith("NoExtension"):
        return f"nothing fits the {kind}"
    if kind == GRAMMAR:
        return f"the grammar is invalid: {_line(message)}"
    if kind == TOOLS:
        message = LISTING.sub("", INSIDE.sub("", message))
    keys, form = UNIMPLEMENTED.search(message), UNKNOWN_FORMAT.search(message)
    if keys:
        return f"the schema uses {', '.join(json.loads(keys[1]))}, which is not supported; leave it out"
    if form:
        return f"the schema uses format {_line(form[1])!r}, which is not supported; leave it out"
    keyword = next((keyword for start, keyword in KEYWORDS.items() if message.startswith(start)), "")
    about = f"its {keyword}: " if keyword else ""
    return f"the schema cannot be enforced: {about}{_line(message)}"


def _line(message: str) -> str:
    return " ".join(message.split())[:300]

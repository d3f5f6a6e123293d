"""Compares the runner's tokenizer and chat template with transformers' for the original checkpoint, on a set of probes.

It runs the runner's own code (axrun.text.tokenizer, axrun.text.template) on the files that go into the bundle.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from datetime import datetime
from types import ModuleType
from typing import Any

import axrun.text.template
from axrun.text.template import ChatTemplate
from axrun.text.tokenizer import Tokenizer

MOST_SINGLE = 2048  # ids decoded one by one, spread over the vocabulary
TOGETHER = 32  # added tokens per text

PLAIN = (
    *("", " ", "  ", "\t", "\n", "\n\n", "\r\n", " \n ", " a", "a ", "  a  b  ", "a\n b\n\n  c\t\td", "\n a", "a\r\rb"),
    *("a\u00a0b\u3000c\u2003d", "\u200b\u2060a\u200d", "a\u2028b\u2029c\x0b\x0cd\x85", "\ufeffa\ufeff", "a\ufffdb"),
    *("0", "1234567890", "3.14e-7", "1,234.5", "\uff11\uff12\uff13", "\u0663\u0664\u0665", "v2 x86_64 2024-01-31"),
    *(
        "it's THEY'LL we\u2019ve",
        "HelloWorld snake_case kebab-case",
        "na\u00efve \u00c6r\u00f8",
        "\ufb01 \u2126 \u2460",
    ),
    *(
        "e\u0301 a\u0308\u0323 o\u0302\u0301",
        "\u1e9b\u0323",
        "\u110b\u1165\u11ab \uc5b8",
        "\u0e01\u0e33 \u0e19\u0e49\u0e33",
    ),
    *(
        "\u6f22\u5b57\u3068\u4eee\u540d\u3002\u30ab\u30bf",
        "\u4f60\u597d\uff0c\u4e16\u754c\uff01",
        "\U00020000\U0002a6d6",
    ),
    *("\u0645\u0631\u062d\u0628\u064b\u0627", "\u0928\u092e\u0938\u094d\u0924\u0947", "\u05e9\u05c1\u05dc\u05d5\u05dd"),
    *(
        "\U0001f99c",
        "\U0001f3f3\ufe0f\u200d\U0001f308",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "\U0001f44d\U0001f3fd",
    ),
    *(
        "\U0001f1e9\U0001f1ea 1\ufe0f\u20e3",
        "\x00\x01\x07\x1b[0m\x7f\x80\x9f",
        "\ue000\U000f0000\U0010fffd",
        "\ud7ff\ufdd0",
    ),
    *("a" * 500, " " * 130, "\n" * 70, "ab" * 300, "-" * 200, "\t" * 40, "\u6f22" * 60, "1" * 90),
    *(
        "def f(x):\n    return {'a': [x, 1.0]}  # no\n",
        "https://example.com/a?b=c&d=%20#e",
        "\\n \\u0041 <b>&amp;</b> </s>",
    ),
    *("A very common sentence, with commas; and (parentheses).", "\u2581a \u2581 \u0120b", "<0x0A> <0xE4>"),
    "".join(map(chr, range(256))),
)
BROKEN = ("\u6f22", "\U0001f99c", "\u00e9\u00e9")  # texts whose tokens are decoded partially

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "\u00fc"}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds <two> numbers & returns the sum.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}


def _typed(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


_SYSTEM = {"role": "system", "content": "Be kind.\n"}
_ASK = {"role": "user", "content": ' What is <1> & "2"?\n '}
_SAID = {"role": "assistant", "content": "Hello \u6f22\u5b57\n"}
_TYPED = {"role": "user", "content": _typed("What", " is it? ")}
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "a user's message": ([_ASK], {}),
    "a system message": ([_SYSTEM, _ASK], {}),
    "several turns": ([_SYSTEM, _ASK, _SAID, _ASK, _SAID, {"role": "user", "content": "?"}], {}),
    "an assistant's message last": ([_ASK, _SAID], {}),
    "an assistant's message first": ([_SAID, _ASK], {}),
    "two questions in a row": ([_ASK, _ASK], {}),
    "a system message alone": ([_SYSTEM], {}),
    "empty content": ([{"role": "user", "content": ""}], {}),
    "typed content": ([_TYPED], {}),
    "typed content in every message": (
        [
            {"role": "system", "content": _typed("Be kind.")},
            _TYPED,
            {"role": "assistant", "content": _typed("So.")},
            _TYPED,
        ],
        {},
    ),
    "reasoning": ([_ASK, {**_SAID, "reasoning_content": "Well."}, _ASK], {}),
    "an answer with thoughts": ([_ASK, {"role": "assistant", "content": "<think>\nWell.\n</think>\n\nSo."}, _ASK], {}),
    "tool calls": (
        [
            _ASK,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "add", "tool_call_id": "1", "content": "3"},
        ],
        {},
    ),
    "tool calls without content": (
        [_ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "3"}, _SAID],
        {},
    ),
    "tools": ([_SYSTEM, _ASK], {"tools": [TOOL]}),
}


def tokenizer_differences(ours: Tokenizer, theirs: Any) -> Iterator[str]:
    """Differences in encoding and decoding, in words; empty if they agree. `theirs` is transformers'."""
    texts = probe(ours, theirs)
    lists: list[list[int]] = []
    for special in (True, False):
        expected = theirs(texts, add_special_tokens=special)["input_ids"]
        for text, ids in zip(texts, expected, strict=True):
            got = ours.encode(text, special)
            if got != list(ids):
                how = "" if special else " without the special tokens it adds"
                yield f"{_short(text)}{how} is {_short(got)}, and {_short(list(ids))} with transformers"
            lists.append(list(ids))
    for ids in [*lists, *_odd_lists(theirs)]:
        for special in (True, False):
            text = theirs.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)
            if (got_text := ours.decode(ids, special)) != text:
                yield f"{_short(ids)} decodes to {_short(got_text)}, and to {_short(text)} with transformers"


def probe(ours: Tokenizer, theirs: Any) -> list[str]:
    """The texts to encode: unusual ones, and the added tokens of both within and next to other text."""
    return [*PLAIN, *_with_tokens(sorted(_added(ours) | _added_of(theirs)))]


def added_differences(ours: Tokenizer, theirs: Any) -> list[str]:
    """Added tokens that differ in id or flags, or exist in only one of the two."""
    one, other = _added_by_id(ours), _added_by_id_of(theirs)
    numbers = sorted(number for number in {*one, *other} if one.get(number) != other.get(number))
    return [f"{number} {(other.get(number) or one[number])[0]!r}" for number in numbers]


def template_differences(template: ChatTemplate, theirs: Any, source: str) -> Iterator[str]:
    """Conversations rendered differently, or refused by only one of the two; both see the same clock."""
    for name, (messages, given) in CONVERSATIONS.items():
        for prompt in (True, False):
            with _same_clock():
                got = _rendered(lambda: template.render(messages, add_generation_prompt=prompt, **given))  # noqa: B023
                expected = _rendered(
                    lambda: theirs.apply_chat_template(
                        messages,  # noqa: B023
                        chat_template=source,
                        tokenize=False,
                        add_generation_prompt=prompt,  # noqa: B023
                        **given,  # noqa: B023
                    )
                )
            if got != expected:
                one, other = _at_difference(got, expected), _at_difference(expected, got)
                yield f"{name} becomes {one}, and {other} with transformers"


def _rendered(render: Any) -> str | None:
    """None where it is refused."""
    try:
        return str(render())
    except Exception:  # a template is a program of its own
        return None


def _with_tokens(tokens: Sequence[str]) -> Iterator[str]:
    for token in tokens:
        yield from (token, f"a{token}b", f" {token} ", f"a {token} b", f"a\n{token}\nb", token + token)
    for start in range(0, len(tokens), TOGETHER):
        some = tokens[start : start + TOGETHER]
        yield from (glue.join(some) for glue in ("", " ", "\n", "a", "\u6f22 "))
    draw = random.Random(0)
    words = [*PLAIN[:24], *tokens[:64], "the", " cat", "\u6f22", "12", "!"]
    for _ in range(32):
        yield "".join(draw.choice(words) for _ in range(24))


def _odd_lists(theirs: Any) -> Iterator[list[int]]:
    """Ids that no text is encoded to: single ones, parts of characters, special tokens between them."""
    known = sorted(theirs.get_vocab().values())
    step = max(1, len(known) // MOST_SINGLE)
    singles = {*known[::step], *known[-256:], *known[:512]}
    yield from ([number] for number in sorted(singles))
    special = sorted(number for number, token in _added_by_id_of(theirs).items() if token[1]["special"])[:4]
    for text in BROKEN:
        ids = list(theirs(text, add_special_tokens=False)["input_ids"])
        yield from (ids[1:], ids[:-1], ids[:1] * 3, ids[::-1], [*ids[:-1], *special, *ids[-1:]], [*special, *ids])
    draw = random.Random(1)
    yield from (draw.choices(known, k=12) for _ in range(64))


def _added(ours: Tokenizer) -> set[str]:
    return {content for content, _ in _added_by_id(ours).values()}


def _added_of(theirs: Any) -> set[str]:
    return {content for content, _ in _added_by_id_of(theirs).values()}


Added = dict[int, tuple[str, dict[str, bool]]]


def _added_by_id(ours: Tokenizer) -> Added:
    return described(ours.added_tokens)


def _added_by_id_of(theirs: Any) -> Added:
    return described(theirs.added_tokens_decoder)


def described(tokens: Any) -> Added:
    flags = ("lstrip", "normalized", "rstrip", "single_word", "special")
    return {
        int(number): (token.content, {flag: bool(getattr(token, flag)) for flag in flags})
        for number, token in tokens.items()
    }


@contextlib.contextmanager
def _same_clock() -> Iterator[None]:
    """Templates that write the date are rendered by both at one time."""
    from transformers.utils import chat_template_utils

    instant = datetime.now()

    class Stopped(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return instant

    modules: list[ModuleType] = [axrun.text.template, chat_template_utils]
    before = [vars(module)["datetime"] for module in modules]
    try:
        for module in modules:
            vars(module)["datetime"] = Stopped
        yield
    finally:
        for module, clock in zip(modules, before, strict=True):
            vars(module)["datetime"] = clock


def _at_difference(text: str | None, other: str | None) -> str:
    if text is None:
        return "a refusal"
    at = next(
        (i for i, (a, b) in enumerate(zip(text, other or "", strict=False)) if a != b), min(len(text), len(other or ""))
    )
    return f"{'...' if at > 20 else ''}{text[max(at - 20, 0) :]!r:.60}"


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

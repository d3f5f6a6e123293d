"""Sanitises control tokens: spelled in a message they are text, written by the chat template they are control tokens.

Control tokens are the special tokens, and other added tokens that occur in the text of the template (or that
tokenizer_config.json lists as `chat_control_tokens`). Before rendering, each of their spellings in a message is
enclosed in two marks (private-use characters). In the rendered prompt, the text between marks is encoded without added
tokens, and everything else as usual. A conversation without such spellings is encoded as a whole, so that its ids are
those of the plain prompt. transformers' `apply_chat_template(sanitize_control_tokens=True)` has the same rule, and the
tests compare with it. Limitation of both: a template that deletes, joins or changes the case of parts of a message can
still form a control token.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from axrun.errors import BadInput

if TYPE_CHECKING:
    from axrun.text.template import ChatTemplate
    from axrun.text.tokenizer import Tokenizer

BEGIN, END = "\U000f0000", "\U000f0001"
MARKS = re.compile(f"[{BEGIN}{END}]")
# a mark escaped in ASCII JSON, in Python's repr, and in a URL
ESCAPED = re.compile(r"\\u[dD][bB]80\\u[dD][cC]0[01]|\\U000[fF]000[01]|%F3%B0%80%8[01]")
KEPT = ("role", "type")  # keys of a message or part whose values are names that templates compare, not text


@functools.lru_cache(maxsize=8)
def control_ids(tokenizer: Tokenizer, template: ChatTemplate) -> frozenset[int]:
    """The ids of the control tokens, as in transformers' `_get_control_tokens`."""
    listed, literals = template.control_tokens, template.literals
    return tokenizer.special_ids.union(
        number
        for number, token in tokenizer.added_tokens.items()
        if (token.content in listed if listed is not None else _stands_in(token.content, literals))
    )


def _stands_in(token: str, literals: Collection[str]) -> bool:
    return bool(token) and not token.isspace() and any(token in literal for literal in literals)


class Marker:
    """Marks spellings of control tokens. `spelled` collects those found."""

    def __init__(self, tokenizer: Tokenizer, control: frozenset[int]) -> None:
        self._tokenizer, self._control = tokenizer, control
        self.spelled: set[str] = set()

    def mark(self, value: Any) -> Any:
        """The value with all strings marked; marks that the input already contains are removed."""
        if isinstance(value, str):
            plain = MARKS.sub("", value)
            pieces, at = [], 0
            for start, stop in self._tokenizer.spans(plain, self._control):
                self.spelled.add(plain[start:stop])
                pieces += [plain[at:start], BEGIN, plain[start:stop], END]
                at = stop
            return "".join([*pieces, plain[at:]])
        if isinstance(value, Mapping):
            return {self._key(key): self._entry(key, entry) for key, entry in value.items()}
        return [self.mark(entry) for entry in value] if isinstance(value, (list, tuple)) else value

    def _key(self, key: Any) -> Any:
        """Keys that a template may access stay unmarked; others are text, which a template may dump as JSON."""
        return key if not isinstance(key, str) or key.isidentifier() else self.mark(key)

    def _entry(self, key: Any, entry: Any) -> Any:
        return MARKS.sub("", entry) if key in KEPT and isinstance(entry, str) else self.mark(entry)


def encode_marked(tokenizer: Tokenizer, prompt: str, marker: Marker, control: frozenset[int]) -> list[int]:
    """Token ids of a rendered prompt with marks. Raises BadInput if the template damaged them."""
    if ESCAPED.search(prompt):
        raise BadInput(
            "a message spells a special token, and the chat template escapes it, so that it cannot be encoded as text\n"
            "Remove it from the message, or use --parse-special to make it a control token."
        )
    ids: list[int] = []
    at, opened, first = 0, False, True
    for found in [*MARKS.finditer(prompt), None]:
        stop = len(prompt) if found is None else found.start()
        closed = found is not None and found[0] == END
        for piece, text in _pieces(tokenizer, prompt[at:stop], opened, closed, marker.spelled, control):
            if first and not text:
                ids += tokenizer.encode(piece, special=False)
            else:
                ids += tokenizer.encode_after(piece, control if text else frozenset())
            first = False
        if found is not None:
            at, opened = found.end(), found[0] == BEGIN
    return ids


def _pieces(
    tokenizer: Tokenizer, piece: str, opened: bool, closed: bool, spelled: Collection[str], control: frozenset[int]
) -> Iterator[tuple[str, bool]]:
    """Splits the prompt at the marks into pieces, each with a flag whether it is text.

    A template may cut off one mark of a pair. Then the string next to the remaining mark is text if a message spelled
    it; otherwise the template wrote it, e.g. if it splits a message at `</think>`.
    """
    if opened and closed:
        yield from [(piece, True)] if piece else []
        return
    spans = tokenizer.spans(piece, control) if opened or closed else []
    spans = [span for span in spans if piece[slice(*span)] in spelled]
    start = spans[0][1] if opened and spans and spans[0][0] == 0 else 0
    stop = spans[-1][0] if closed and spans and spans[-1][1] == len(piece) else len(piece)
    parts = (piece[:start], True), (piece[start:stop], False), (piece[stop:], True)
    yield from (part for part in parts if part[0])

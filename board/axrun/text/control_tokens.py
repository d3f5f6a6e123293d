"""Control tokens that a message spells are text; those that the chat template writes are control tokens.

Control tokens are the special tokens, and the other added tokens that stand in the template's own text (or that
tokenizer_config.json lists as `chat_control_tokens`). Before the template is rendered, each of their spellings in a
message is put between two marks, characters for private use. What stands between them in the prompt is encoded without
the tokenizer's added tokens, all else as always. A conversation that spells none is encoded as a whole, so that its ids
are those of the plain prompt. transformers' `apply_chat_template(sanitize_control_tokens=True)` has the same rule, and
is what this is tested against. The limit of both: a template that deletes, joins or recases parts of a message can
still form a control token of text that spelled none.
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
# a mark in JSON that is plain ASCII, as Python's repr shows it, and in a URL
ESCAPED = re.compile(r"\\u[dD][bB]80\\u[dD][cC]0[01]|\\U000[fF]000[01]|%F3%B0%80%8[01]")
KEPT = ("role", "type")  # of a message or its parts: names that templates compare, no text


@functools.lru_cache(maxsize=8)
def control_ids(tokenizer: Tokenizer, template: ChatTemplate) -> frozenset[int]:
    """The control tokens, as transformers' `_get_control_tokens` has them."""
    listed, literals = template.control_tokens, template.literals
    return tokenizer.special_ids.union(
        number
        for number, token in tokenizer.added_tokens.items()
        if (token.content in listed if listed is not None else _stands_in(token.content, literals))
    )


def _stands_in(token: str, literals: Collection[str]) -> bool:
    return bool(token) and not token.isspace() and any(token in literal for literal in literals)


class Marker:
    """Marks what spells one of the control tokens. `spelled` are the spellings it found."""

    def __init__(self, tokenizer: Tokenizer, control: frozenset[int]) -> None:
        self._tokenizer, self._control = tokenizer, control
        self.spelled: set[str] = set()

    def mark(self, value: Any) -> Any:
        """The value with all strings in it marked, without the marks that are there already: nobody else sets any."""
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
        """Names that a template may ask for stay; others are text, which a template may show as JSON."""
        return key if not isinstance(key, str) or key.isidentifier() else self.mark(key)

    def _entry(self, key: Any, entry: Any) -> Any:
        return MARKS.sub("", entry) if key in KEPT and isinstance(entry, str) else self.mark(entry)


def encode_marked(tokenizer: Tokenizer, prompt: str, marker: Marker, control: frozenset[int]) -> list[int]:
    """Token ids of a rendered prompt with marks. Raises BadInput where the template has damaged them."""
    if ESCAPED.search(prompt):
        raise BadInput(
            "a message spells a special token, and the chat template escapes it so that it cannot be kept as text\n"
            "Leave it out, or let it be a control token: --parse-special."
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
    """What stands between two places of marks, and whether it is text.

    A template may cut a mark off its other half: then it is still what stands right beside the one that is left, if
    a message spells that. Otherwise it is the template's own, as where a message is split at `</think>`.
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

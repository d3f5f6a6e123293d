"""Special tokens that a message spells are text; those that the chat template writes are control tokens.

Before the template is rendered, each such spelling in a message is put between two marks, characters for private use.
What stands between them in the prompt is encoded without the tokenizer's special tokens, all else as always. A
conversation that spells none is encoded as a whole, so that its ids are those of the plain prompt. transformers'
`apply_chat_template(sanitize_control_tokens=True)` has the same rule, and is what this is tested against.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from board.errors import BadInput

if TYPE_CHECKING:
    from board.tokenizer import Tokenizer

BEGIN, END = "\U000f0000", "\U000f0001"
MARKS = re.compile(f"[{BEGIN}{END}]")
ESCAPED = re.compile(r"\\u[dD][bB]80\\u[dD][cC]0[01]")  # a mark in JSON that is plain ASCII
KEPT = ("role", "type")  # of a message or its parts: names that templates compare, no text


def mark(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """The messages with every spelling of a special token marked; None where there is none."""
    found = False

    def walk(value: Any) -> Any:
        nonlocal found
        if isinstance(value, str):
            if not tokenizer.spells_special(value):
                return value
            found = True
            plain = MARKS.sub("", value)  # nobody else may set marks
            pieces, at = [], 0
            for start, stop in tokenizer.special_spans(plain):
                pieces += [plain[at:start], BEGIN, plain[start:stop], END]
                at = stop
            return "".join([*pieces, plain[at:]])
        if isinstance(value, Mapping):
            return {
                key: entry if key in KEPT and isinstance(entry, str) else walk(entry) for key, entry in value.items()
            }
        return [walk(entry) for entry in value] if isinstance(value, (list, tuple)) else value

    marked = [walk(message) for message in messages]
    return marked if found else None


def encode_marked(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of a rendered prompt with marks. Raises BadInput where the template has damaged them."""
    if ESCAPED.search(prompt):
        raise BadInput(
            "a message spells a special token, and the chat template escapes it so that it cannot be kept as text\n"
            "Leave it out, or let it be a control token: --parse-special."
        )
    ids: list[int] = []
    at, opened = 0, False
    for found in [*MARKS.finditer(prompt), None]:
        stop = len(prompt) if found is None else found.start()
        for piece, text in _pieces(tokenizer, prompt[at:stop], opened, found is not None and found[0] == END):
            ids += tokenizer.encode_after(piece, text) if at else tokenizer.encode(piece, special=False)
        if found is not None:
            at, opened = found.end(), found[0] == BEGIN
    return ids


def _pieces(tokenizer: Tokenizer, piece: str, opened: bool, closed: bool) -> Iterator[tuple[str, bool]]:
    """What stands between two places of marks, and whether it is text.

    A template may cut a mark off its other half: then it is still what stands right beside the one that is left.
    """
    if opened and closed:
        yield from [(piece, True)] if piece else []
        return
    spans = tokenizer.special_spans(piece) if opened or closed else []
    start = spans[0][1] if opened and spans and spans[0][0] == 0 else 0
    stop = spans[-1][0] if closed and spans and spans[-1][1] == len(piece) else len(piece)
    parts = (piece[:start], True), (piece[start:stop], False), (piece[stop:], True)
    yield from (part for part in parts if part[0])

"""Separates what a reasoning model thinks from what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from axrun.text.template import ChatTemplate
from axrun.text.tokenizer import Tokenizer

TAIL = 16  # tokens of the prompt that may spell the mark of thoughts
MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))


@dataclass(frozen=True)
class Thinking:
    """The marks around the thoughts. `open`: the prompt ends with `begin`, so that the answer starts with thoughts."""

    begin: str
    end: str
    open: bool = False

    def stream(self) -> ThinkStream:
        """Separates the thoughts from the text of one answer."""
        return ThinkStream(self)


def marks_of(template: ChatTemplate) -> tuple[str, str] | None:
    """The marks that a chat template knows, or None: then an answer has no thoughts."""
    text = "\n".join(template.literals)
    return next((marks for marks in MARKS if any(mark in text for mark in marks)), None)


def thinking_after(ids: Sequence[int], marks: tuple[str, str], tokenizer: Tokenizer) -> Thinking:
    """The thinking of the answer to a prompt, which may end with the first mark."""
    tail = tokenizer.decode(ids[-TAIL:], special=True).rstrip()
    return Thinking(*marks, open=tail.endswith(marks[0]))


def special_marks(marks: tuple[str, str], tokenizer: Tokenizer) -> Mapping[int, str]:
    """Marks that are special tokens, by id: decoding omits them."""
    added = tokenizer.added_tokens
    return {token: added[token].content for token in tokenizer.special_ids if added[token].content in marks}


class ThinkStream:
    """The thoughts and the text of one answer, both without white space around them."""

    def __init__(self, thinking: Thinking) -> None:
        self._marks = thinking
        self._held = ""
        self._decided = thinking.open
        self._inside = thinking.open
        self._space = ""  # white space that ends the thoughts so far
        self._begun = False  # the current part has text
        self._trims = False  # the text follows thoughts

    @property
    def inside(self) -> bool:
        """Whether the thoughts have begun and not ended."""
        return self._inside

    def push(self, text: str) -> tuple[str, str]:
        """Adds text; returns the thoughts and the text that are final."""
        self._held += text
        if not self._decided:
            start = self._held.lstrip()
            if not start or (self._marks.begin.startswith(start) and start != self._marks.begin):
                return "", ""
            self._decided = True
            self._inside = start.startswith(self._marks.begin)
            if self._inside:
                self._held = start[len(self._marks.begin) :]
        return self._split(last=False)

    def finish(self) -> tuple[str, str]:
        """What is left at the end of the answer."""
        self._decided = True
        return self._split(last=True)

    def _split(self, last: bool) -> tuple[str, str]:
        thoughts, end = "", self._marks.end
        if self._inside:
            before, found, after = self._held.partition(end)
            if not found:
                count = len(before) - (0 if last else overlap(before, end))
                self._held = before[count:]
                return self._thoughts(before[:count]), ""
            thoughts, self._held = self._thoughts(before), after
            self._inside, self._begun = False, False
            self._trims = True
        text, self._held = self._held, ""
        if self._trims and not self._begun:  # white space between the thoughts and the answer
            text = text.lstrip()
            self._begun = bool(text)
        return thoughts, text

    def _thoughts(self, text: str) -> str:
        text = self._space + text if self._begun else text.lstrip()
        shown = text.rstrip()
        self._space = text[len(shown) :]
        self._begun |= bool(shown)
        return shown


def overlap(text: str, mark: str) -> int:
    """Length of the longest end of a text that begins the mark."""
    return next((count for count in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-count:])), 0)

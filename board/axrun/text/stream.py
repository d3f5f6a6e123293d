"""Text from tokens as they come: never half a character, and in time linear in their number."""

from __future__ import annotations

from axrun.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what bytes that are no UTF-8, or not yet, decode to
LONGEST_CHARACTER = 4  # bytes of one in UTF-8, and so tokens
CONTEXT = 8  # tokens without a text that may change the first one that has some


class TextStream:
    """The text of one answer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._shown: list[int] = []  # tokens before, as decoders treat the first word of a text in their own way
        self._before = ""  # their text
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that is complete with `token`; perhaps none."""
        self._held.append(token)
        text = self._text()
        if text.endswith(REPLACEMENT) and len(self._held) < LONGEST_CHARACTER:
            return ""
        return self._show(text)

    def finish(self) -> str:
        """What is left when no token follows."""
        return self._show(self._text())

    def _text(self) -> str:
        return self._tokenizer.decode(self._shown + self._held)[len(self._before) :]

    def _show(self, text: str) -> str:
        if text.endswith(REPLACEMENT):  # bytes that were no character must not join the next token's
            self._shown = []
        elif text:
            self._shown = self._held
        elif not self._before:
            self._shown = (self._shown + self._held)[-CONTEXT:]
        self._held = []
        self._before = self._tokenizer.decode(self._shown)
        return text

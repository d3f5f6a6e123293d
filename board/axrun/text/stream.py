"""Streaming detokenisation: only whole characters, in linear time."""

from __future__ import annotations

from axrun.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # decoded from bytes that are invalid or incomplete UTF-8
LONGEST_CHARACTER = 4  # in bytes of UTF-8, and therefore in tokens
CONTEXT = 8  # preceding tokens without text that may affect the next text


class TextStream:
    """The text of one answer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._shown: list[int] = []  # preceding tokens: decoders treat the first word of a text differently
        self._before = ""  # their text
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """Adds a token; returns the text that is complete now, which may be empty."""
        self._held.append(token)
        text = self._text()
        if text.endswith(REPLACEMENT) and len(self._held) < LONGEST_CHARACTER:
            return ""
        return self._show(text)

    def finish(self) -> str:
        """The remaining text at the end of the answer."""
        return self._show(self._text())

    def _text(self) -> str:
        return self._tokenizer.decode(self._shown + self._held)[len(self._before) :]

    def _show(self, text: str) -> str:
        if text.endswith(REPLACEMENT):  # invalid bytes must not join those of the next token
            self._shown = []
        elif text:
            self._shown = self._held
        elif not self._before:
            self._shown = (self._shown + self._held)[-CONTEXT:]
        self._held = []
        self._before = self._tokenizer.decode(self._shown)
        return text

"""Separates tool calls from text in a streamed answer."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Union

from axrun.text.thinking import overlap
from axrun.text.tool_formats import PREFIXES, Call, Format, NotACall, calls_of

Part = Union[str, Call]


class ToolStream:
    """The text and calls of one answer. Calls of unknown tools stay text; with `single`, only the first call counts."""

    def __init__(self, format: Format, names: Collection[str], single: bool = False) -> None:
        self._format, self._names, self._single = format, names, single
        self._held = ""
        self._inside = False  # after `begin`
        self._plain = False  # the whole answer is text
        self._space = ""  # white space that is not shown before a call
        self._calls = 0

    def push(self, text: str) -> Iterator[Part]:
        """Adds text; yields what is final."""
        self._held += text
        if self._plain:
            yield from self._text(self._take(len(self._held)))
        elif not self._format.begin:
            start = self._held.lstrip()
            if start and not (start[0] in "{[" or any(_may_be(start, prefix) for prefix in PREFIXES)):
                self._plain = True
                yield from self._text(self._take(len(self._held)))
        else:
            yield from self._sections()

    def finish(self) -> Iterator[Part]:
        """What is left at the end of the answer."""
        held, self._held = self._held, ""
        if self._inside or (not self._format.begin and not self._plain):
            yield from self._section(held)
        else:
            yield from self._text(held)
        if self._space and not self._calls:
            yield self._space

    def _sections(self) -> Iterator[Part]:
        begin, end = self._format.begin, self._format.end or self._format.begin
        while True:
            if not self._inside:
                at = self._held.find(begin)
                if at < 0:
                    yield from self._text(self._take(len(self._held) - overlap(self._held, begin)))
                    return
                yield from self._text(self._take(at))
                self._inside = True
            at = self._held.find(end, len(begin))
            if at < 0:
                return
            yield from self._section(self._take(at + len(self._format.end)))
            self._inside = False

    def _section(self, raw: str) -> Iterator[Part]:
        text = raw.strip()
        for mark in (self._format.begin, *PREFIXES):
            text = text[len(mark) :] if mark and text.startswith(mark) else text
        end = self._format.end
        try:
            calls = calls_of(self._format, text[: -len(end)] if end and text.endswith(end) else text)
            if any(call.name not in self._names for call in calls):
                raise NotACall
        except NotACall:
            yield from self._text(raw)
            return
        self._space = ""
        for call in calls:
            if not (self._single and self._calls):
                yield call
            self._calls += 1

    def _text(self, text: str) -> Iterator[str]:
        text = self._space + text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown:
            yield shown

    def _take(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text


def _may_be(start: str, prefix: str) -> bool:
    return start.startswith(prefix) or prefix.startswith(start)

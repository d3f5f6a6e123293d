"""Separates one answer into thoughts, text and tool calls, the same way for every API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

from axrun.serve.tools import Tools
from axrun.serve.writer import Piece
from axrun.text.thinking import Thinking
from axrun.text.tool_formats import Call

STOP, TOOL_CALLS = "stop", "tool_calls"  # finish reasons


@dataclass(frozen=True)
class Thoughts:
    """A part of the thoughts."""

    text: str


Part = Union[Thoughts, str, Call]


class Splitter:
    """The parts of one answer. `thought` counts the tokens of the thoughts so far."""

    def __init__(self, thinking: Thinking | None, tools: Tools | None) -> None:
        self._thoughts = None if thinking is None else thinking.stream()
        self._tools = None if tools is None else tools.stream()
        self._called = False
        self.thought = 0

    def push(self, piece: Piece) -> list[Part]:
        """The parts that a piece completes, in order. The last piece completes all."""
        parts: list[Part] = []
        text = piece.text
        if self._thoughts is not None:
            split = [self._thoughts.push(text)]
            if self._thoughts.inside:
                self.thought = piece.written
            if piece.finish:
                split.append(self._thoughts.finish())
            thoughts, text = ("".join(each) for each in zip(*split))
            parts += [Thoughts(thoughts)] if thoughts else []
        if self._tools is None:
            parts += [text] if text else []
        else:
            parts += self._tools.push(text)
            parts += self._tools.finish() if piece.finish else ()
        self._called |= any(isinstance(part, Call) for part in parts)
        return parts

    def finish(self, piece: Piece) -> str:
        """The finish reason of a piece that was pushed."""
        return TOOL_CALLS if self._called and piece.finish == STOP else piece.finish


def text_of(parts: list[Part]) -> str:
    """The text among parts."""
    return "".join(part for part in parts if isinstance(part, str))


def thoughts_of(parts: list[Part]) -> str:
    """The thoughts among parts."""
    return "".join(part.text for part in parts if isinstance(part, Thoughts))


def calls_of(parts: list[Part]) -> list[Call]:
    """The calls among parts."""
    return [part for part in parts if isinstance(part, Call)]

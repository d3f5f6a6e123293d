"""Progress as numbers; the caller decides how to show it: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

BAR = 20  # characters


@dataclass(frozen=True)
class Progress:
    """`done` of `total` parts are finished; `what` describes the current one."""

    done: int
    total: int
    what: str

    def __str__(self) -> str:
        return f"[{self.done}/{self.total}] {self.what}"

    @property
    def bar(self) -> str:
        """The text with a progress bar."""
        full = BAR * self.done // max(self.total, 1)
        return f"[{self.done}/{self.total}] {'#' * full:.<{BAR}} {self.what}"


Show = Callable[[Progress], None]


def unseen(progress: Progress) -> None:
    """Default callback: shows nothing."""


def show(progress: Progress) -> None:
    """Shows progress on stderr: a bar on a terminal, one line per step elsewhere."""
    if sys.stderr.isatty():
        print(
            f"\r\x1b[K{progress.bar}", end="\n" if progress.done == progress.total else "", file=sys.stderr, flush=True
        )
    else:
        print(progress, file=sys.stderr, flush=True)


def show_on_terminal(progress: Progress) -> None:
    """Like `show` on a terminal; shows nothing elsewhere."""
    if sys.stderr.isatty():
        show(progress)


def mention(line: str) -> None:
    """Shows a detail of the current step: overwrites the line on a terminal; shows nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)

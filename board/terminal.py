"""Where a person types: lines with an editor and a history, text that appears as it comes, and Ctrl-C."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from board.conversation import Stopped
from board.errors import BadInput

PROMPT = "> "
HISTORY_LINES = 1000
# What a model may not do to a terminal: control characters are shown, not obeyed, but for tab and newline.
CONTROLS = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
CONTROLS |= dict.fromkeys(range(0x7F, 0xA0), 0xFFFD)


class Discarded(Exception):
    """Ctrl-C while a line was being typed."""


class Terminal:
    """stdin and stdout. `interactive`: a person types; else lines come from a pipe or a file, without a prompt."""

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty()
        self._typing = self._pressed = False

    def write(self, text: str) -> None:
        """Shows whole characters at once; those that the terminal's encoding lacks as question marks."""
        text = text.translate(CONTROLS) if sys.stdout.isatty() else text
        encoding = sys.stdout.encoding
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()

    def lines(self) -> Iterator[str]:
        """Lines until the input ends. Raises BadInput for one of a pipe that is no UTF-8."""
        yield from self._typed() if self.interactive else _piped()

    @contextlib.contextmanager
    def stoppable(self) -> Iterator[Callable[[], None]]:
        """Inside, what is given raises Stopped once a person has pressed Ctrl-C."""
        self._pressed = False

        def between() -> None:
            if self._pressed:
                raise Stopped

        yield between

    def _typed(self) -> Iterator[str]:
        _edit_lines()
        prompt = PROMPT if sys.stdout.isatty() else ""
        before = signal.signal(signal.SIGINT, self._interrupted)
        try:
            while True:
                try:
                    line = self._input(prompt)
                except Discarded:
                    self._typing = False
                    print(file=sys.stderr)
                except UnicodeDecodeError:
                    print("error: that line is not UTF-8", file=sys.stderr)
                except EOFError:
                    print(file=sys.stderr)
                    return
                else:
                    yield line
        finally:
            signal.signal(signal.SIGINT, before)

    def _input(self, prompt: str) -> str:
        self._typing = True
        try:
            return input(prompt)
        finally:
            self._typing = False

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        self._pressed = True
        if self._typing:
            raise Discarded


def _piped() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadInput(f"line {number} of stdin is not UTF-8 at byte {error.start}") from None


def _edit_lines() -> None:
    """Line editing and a history that outlives the program, where Python has readline."""
    try:
        import readline
    except ImportError:
        return
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    history = Path(state) / "axrun" / "history"  # https://specifications.freedesktop.org/basedir-spec/latest/
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    readline.set_history_length(HISTORY_LINES)

    def keep() -> None:
        with contextlib.suppress(OSError):
            history.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            readline.write_history_file(history)

    atexit.register(keep)

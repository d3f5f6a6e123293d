"""Terminal input and output: line editing with a history, streamed text, and Ctrl-C."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TextIO

from axrun.chat.conversation import Stopped
from axrun.errors import BadInput

PROMPT = "> "
HISTORY_LINES = 1000
TICK_SECONDS = 0.2
DIM, PLAIN = "\x1b[2m", "\x1b[22m"  # https://ecma-international.org/publications-and-standards/standards/ecma-48/
# Model output must not control the terminal: control characters except tab and newline are made visible.
CONTROLS = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
CONTROLS |= dict.fromkeys(range(0x7F, 0xA0), 0xFFFD)


class Discarded(Exception):
    """Ctrl-C while typing a line."""


class Terminal:
    """stdin and stdout. `interactive`: a user types; otherwise lines come from a pipe or file, without a prompt."""

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty()
        self._typing = self._pressed = self._thinking = False

    def write(self, text: str) -> None:
        """Writes text and flushes; characters outside the terminal's encoding become question marks."""
        if self._thinking and text:
            _put(_thoughts_to(), "\n")
            self._thinking = False
        _put(sys.stdout, text)

    def think(self, thoughts: str) -> None:
        """Writes thoughts dimmed to a terminal; to stderr if stdout is not one, which then gets only the answer."""
        _put(_thoughts_to(), thoughts, dim=True)
        self._thinking = True

    def lines(self) -> Iterator[str]:
        """Lines until the input ends. Raises BadInput for a line from a pipe that is not UTF-8."""
        yield from self._typed() if self.interactive else _piped()

    def between(self) -> None:
        """Raises Stopped if the user pressed Ctrl-C after the last line."""
        if self._pressed:
            raise Stopped

    def _typed(self) -> Iterator[str]:
        keyed = _edit_lines()
        prompt = PROMPT if sys.stdout.isatty() else ""
        with _heard(self._interrupted):
            while True:
                try:
                    with _interrupt_is_a_key() if keyed else contextlib.nullcontext():
                        line = self._input(prompt)
                except Discarded:
                    print(file=sys.stderr)
                except UnicodeDecodeError:
                    print("error: that line is not UTF-8", file=sys.stderr)
                except EOFError:
                    print(file=sys.stderr)
                    return
                else:
                    yield line

    def _input(self, prompt: str) -> str:
        self._pressed = False  # later key presses do not concern the previous answer
        self._typing = True
        try:
            with _ticking():
                return input(prompt)
        finally:
            self._typing = False

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        self._pressed = True
        if self._typing:
            self._typing = False
            raise Discarded


def _thoughts_to() -> TextIO:
    return sys.stdout if sys.stdout.isatty() else sys.stderr


def _put(stream: TextIO, text: str, dim: bool = False) -> None:
    if stream.isatty():
        text = text.translate(CONTROLS)
        text = f"{DIM}{text}{PLAIN}" if dim else text
    encoding = stream.encoding
    stream.write(text.encode(encoding, "replace").decode(encoding))
    stream.flush()


@contextlib.contextmanager
def _heard(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Installs `handler` for SIGINT; restores the previous one afterwards, unless somebody replaced it meanwhile."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) == handler:
            signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _interrupt_is_a_key() -> Iterator[None]:
    """Turns Ctrl-C into an ordinary key, bound by `_edit_lines`, instead of a signal.

    Signals are not ordered with typed keys, so a Ctrl-C meant for an answer could discard the next question.
    """
    before = termios.tcgetattr(sys.stdin)
    characters = list(before[6])
    characters[termios.VINTR] = os.fpathconf(sys.stdin.fileno(), "PC_VDISABLE").to_bytes(1, "little")
    termios.tcsetattr(sys.stdin, termios.TCSANOW, [*before[:6], characters])
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


@contextlib.contextmanager
def _ticking() -> Iterator[None]:
    """Interrupts waits for a key periodically: a signal just before a wait is otherwise handled only after it."""
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, TICK_SECONDS, TICK_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _piped() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadInput(f"line {number} of stdin is not UTF-8 at byte {error.start}") from None


def _edit_lines() -> bool:
    """Enables line editing with a saved history, if Python has readline. Returns whether Ctrl-C is bound too."""
    try:
        import readline
    except ImportError:
        return False
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
    gnu = "libedit" not in (readline.__doc__ or "")  # libedit has another syntax for bindings
    if gnu:
        readline.parse_and_bind(r'"\C-x\C-c": kill-whole-line')
        readline.parse_and_bind(r'"\C-c": "\C-x\C-c\C-m"')
    return gnu

"""Where a person types: lines with an editor and a history, text that appears as it comes, and Ctrl-C."""

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

from axrun.chat.conversation import Stopped
from axrun.errors import BadInput

PROMPT = "> "
HISTORY_LINES = 1000
TICK_SECONDS = 0.2
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

    def between(self) -> None:
        """Raises Stopped once a person has pressed Ctrl-C behind the last line."""
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
        self._pressed = False  # whatever is pressed from here on is not about the answer before
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


@contextlib.contextmanager
def _heard(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """SIGINT goes to `handler`; afterwards to whom it went before, unless somebody else has taken it meanwhile."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) == handler:
            signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _interrupt_is_a_key() -> Iterator[None]:
    """Ctrl-C comes in its place among the other keys, where `_edit_lines` has bound it, and not as a signal.

    A signal overtakes what was typed before it or is overtaken by what is typed after it, so that a Ctrl-C meant for an
    answer could discard the next question.
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
    """Wakes a wait for a key now and then: a signal that comes just before such a wait is not heard before it ends."""
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
    """Line editing and a history that outlives the program, where Python has readline; whether Ctrl-C is bound too."""
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
    gnu = "libedit" not in (readline.__doc__ or "")  # which binds in another language
    if gnu:
        readline.parse_and_bind(r'"\C-x\C-c": kill-whole-line')
        readline.parse_and_bind(r'"\C-c": "\C-x\C-c\C-m"')
    return gnu

"""Runs a program on a pseudo-terminal: typed input and visible output."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT = 180.0  # seconds
CTRL_C, CTRL_D, UP = b"\x03", b"\x04", b"\x1b[A"
STYLE = re.compile(rb"\x1b\[[?0-9;]*[a-zA-Z]")


class Tty:
    """`python -m axrun ...` on a pseudo-terminal. `seen` is all its output as bytes."""

    def __init__(self, arguments: Sequence[object], environment: Mapping[str, str]) -> None:
        self.seen = b""
        self._read_to = 0
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.execve(
                sys.executable,
                [sys.executable, "-m", "axrun", *map(str, arguments)],
                {**os.environ, "TERM": "xterm", **environment},
            )

    def type(self, keys: bytes | str) -> None:
        os.write(self._fd, keys.encode() if isinstance(keys, str) else keys)

    def expect(self, pattern: str) -> str:
        """Waits until the output since the last match contains the pattern; returns the output up to its end."""
        deadline = time.monotonic() + TIMEOUT
        while not (found := re.search(pattern.encode(), self.seen[self._read_to :])):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.seen[self._read_to :]!r}"
            assert self._more(deadline - time.monotonic()), f"it ended without {pattern!r}: {self.seen!r}"
        start, self._read_to = self._read_to, self._read_to + found.end()
        return STYLE.sub(b"", self.seen[start : self._read_to]).decode("utf-8", "replace")

    def end(self) -> int:
        """Waits for the end; returns the exit code."""
        deadline = time.monotonic() + TIMEOUT
        while self._more(deadline - time.monotonic()):
            assert time.monotonic() < deadline, f"it does not end: {self.seen!r}"
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        """Cleans up after a test that ends early."""
        os.close(self._fd)
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass

    def _more(self, seconds: float) -> bool:
        ready, _, _ = select.select([self._fd], [], [], max(seconds, 0))
        if not ready:
            return True
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # Linux raises this when the other end is closed
            return False
        self.seen += data
        return bool(data)

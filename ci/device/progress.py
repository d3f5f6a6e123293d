"""Progress of long commands: a line every few seconds while one runs, and the seconds that a step took."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

EVERY = 15.0  # seconds between two lines
TAIL = 4096  # bytes read to find the last line of a console
POLL = 0.05

Say = Callable[[str], None]


def watched(
    command: Sequence[str],
    what: str,
    say: Say,
    *,
    seconds: float,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    every: float = EVERY,
) -> subprocess.CompletedProcess[str]:
    """Runs a command; its stdout and stderr are returned together as `stdout`.

    Every `every` seconds, `say` gets the elapsed time and the last line of output. Raises subprocess.TimeoutExpired
    after `seconds`; the command is killed on any exception.
    """
    started = time.monotonic()
    with tempfile.TemporaryFile() as console:
        process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT
        )
        try:
            _wait(process, console, what, say, started, seconds, every)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        console.seek(0)
        return subprocess.CompletedProcess(command, process.returncode, console.read().decode("utf-8", "replace"))


def _wait(
    process: subprocess.Popen[bytes],
    console: IO[bytes],
    what: str,
    say: Say,
    started: float,
    seconds: float,
    every: float,
) -> None:
    told = started
    while process.poll() is None:
        now = time.monotonic()
        if now - started > seconds:
            raise subprocess.TimeoutExpired(process.args, seconds)
        if now - told >= every:
            told = now
            last = _last_line(console)
            say(f"{what}: {now - started:.0f} s" + (f", {last}" if last else ""))
        time.sleep(POLL)


def _last_line(console: IO[bytes]) -> str:
    """The last line so far, printable. Uses pread: the file position is shared with the writer."""
    size = os.fstat(console.fileno()).st_size
    lines = os.pread(console.fileno(), TAIL, max(0, size - TAIL)).decode("utf-8", "replace").splitlines()
    shown = [line.strip() for line in lines if line.strip()]
    return "".join(c if c.isprintable() else "?" for c in shown[-1])[:120] if shown else ""


def took(started: float) -> str:
    """A suffix with the elapsed time, ` (3.2 s)`; `started` is from time.monotonic()."""
    return f" ({time.monotonic() - started:.1f} s)"

"""What takes long says so: a line every few seconds while a command runs, and the seconds a step took."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

EVERY = 15.0  # seconds between two lines
TAIL = 4096  # bytes of a console that are looked at for its last line
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
    """Runs a command and returns what it wrote to stderr and stdout, together, as `stdout`.

    Every `every` seconds `say` is given how long it has run and the last line it wrote. Raises
    subprocess.TimeoutExpired after `seconds`; the command has been ended then, as after any other exception.
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
    """The last line that is there, printable; its file's position is the writer's too, and stays."""
    size = os.fstat(console.fileno()).st_size
    lines = os.pread(console.fileno(), TAIL, max(0, size - TAIL)).decode("utf-8", "replace").splitlines()
    shown = [line.strip() for line in lines if line.strip()]
    return "".join(c if c.isprintable() else "?" for c in shown[-1])[:120] if shown else ""


def took(started: float) -> str:
    """For the end of a line: ` (3.2 s)` since `started` of time.monotonic()."""
    return f" ({time.monotonic() - started:.1f} s)"

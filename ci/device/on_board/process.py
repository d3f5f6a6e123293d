"""Runs a program for a request; kills it on a timeout, on too much output, or when the client disconnects."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from typing import IO, Any

POLL_SECONDS = 0.05
MOST, FULL = 64 << 20, 125  # most bytes of output, and the exit code of a program that wrote more
SHOWN = 4000  # characters of output in an answer


def run(command: list[str], limit: float, shown: int) -> dict[str, Any]:
    """A program's exit code (None: timed out), the start of its stdout and the end of its stderr."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True
        )
        deadline = time.monotonic() + limit
        while process.poll() is None:
            gone = bool(select.select([sys.stdin], [], [], POLL_SECONDS)[0])  # only the end of the input can arrive now
            full = any(os.fstat(file.fileno()).st_size > MOST for file in (stdout, stderr))
            if full or gone or time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if gone:
                    sys.exit()
                if full:
                    return {"code": FULL, "stdout": "", "stderr": f"error: it wrote more than {MOST >> 20} MB"}
                return {"code": None, "stdout": "", "stderr": ""}
        return {"code": process.returncode, "stdout": _start(stdout, shown), "stderr": _end(stderr)}


def _start(file: IO[bytes], shown: int) -> str:
    file.seek(0)
    return file.read(shown).decode("utf-8", "replace")


def _end(file: IO[bytes]) -> str:
    file.seek(max(file.seek(0, os.SEEK_END) - SHOWN, 0))
    return file.read(SHOWN).decode("utf-8", "replace")

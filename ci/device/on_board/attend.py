"""Runs the current release's axrun on a board while the client is connected.

The first line of the input is a JSON object: the folder of the releases, axrun's arguments, its stdin. After that, the
client sends a heartbeat byte every few seconds. When the heartbeats stop or the input ends, axrun and its children are
killed. No shell interprets the user's text.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SILENCE_SECONDS = 60.0  # without a heartbeat the client is gone
GRACE_SECONDS = 15.0  # between SIGTERM and SIGKILL
POLL_SECONDS = 0.05
NO_RELEASE = 66  # exit code


def main() -> int:
    request = json.loads(sys.stdin.buffer.readline())
    release = Path(os.path.realpath(str(Path.home() / request["root"] / "current")))
    if not (release / "axrun").exists():
        return NO_RELEASE
    verb, *words = request["words"]
    command = ["sh", str(release / "axrun"), verb, str(release / "model"), *words]
    with tempfile.TemporaryFile() as text:
        text.write(request["input"].encode("utf-8", "surrogateescape"))
        text.seek(0)
        process = subprocess.Popen(command, stdin=text, start_new_session=True)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda *_: end(process))
    attend(process)
    end(process)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def attend(process: subprocess.Popen[bytes]) -> None:
    """Waits until the process ends or the client is gone."""
    heard = time.monotonic()
    while process.poll() is None:
        if select.select([0], [], [], POLL_SECONDS)[0]:
            if not os.read(0, 4096):
                return
            heard = time.monotonic()
        elif time.monotonic() - heard > SILENCE_SECONDS:
            return


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and its session: SIGTERM, and SIGKILL after GRACE_SECONDS."""
    for number, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
        if process.poll() is not None:
            break
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # remaining children

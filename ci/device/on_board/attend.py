"""What runs the current release's axrun on a board for as long as the other side is there.

The first line of its input is a JSON object: the folder of the releases, axrun's words, what axrun reads from stdin.
Then a byte every few seconds says that the other side still listens; when they stop, or the input ends, axrun is ended
with all it started. No shell reads what a user wrote.
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

SILENCE_SECONDS = 60.0  # of the other side: it is gone, whatever the network says
GRACE_SECONDS = 15.0  # for axrun to end by itself
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
    """Returns when the process has ended or the other side is gone."""
    heard = time.monotonic()
    while process.poll() is None:
        if select.select([0], [], [], POLL_SECONDS)[0]:
            if not os.read(0, 4096):
                return
            heard = time.monotonic()
        elif time.monotonic() - heard > SILENCE_SECONDS:
            return


def end(process: subprocess.Popen[bytes]) -> None:
    """The process and its session: asked first, made after GRACE_SECONDS."""
    for number, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
        if process.poll() is not None:
            break
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # what it may have left

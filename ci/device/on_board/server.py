"""Controls `axrun serve` on the board for a soak test: start, sample memory, stop.

The server always ends with this program.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from ci.device.on_board import proc
from ci.device.on_board.requests import Refused, answer, leave_if_asked_to

POLL_SECONDS = 0.05
SHOWN = 2000  # characters of the server's output in an answer


class Server:
    """One `axrun serve` at a time."""

    def __init__(self, root: str) -> None:
        self.home = Path.home()
        self.process: subprocess.Popen[bytes] | None = None
        self.told: IO[bytes] | None = None  # its stdout: events, a JSON object a line
        self.said: IO[bytes] | None = None

    def start(self, command: list[str], limit: float) -> dict[str, Any]:
        """Starts a server and waits until it has loaded; returns its port and the seconds it took.

        On failure the port is 0 and `why` has the reason.
        """
        self.end()
        self.told = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the server)
        self.said = tempfile.TemporaryFile()  # noqa: SIM115
        started = time.monotonic()
        try:
            self.process = subprocess.Popen(
                [*command, "--json"],
                cwd=str(self.home),
                stdin=subprocess.DEVNULL,
                stdout=self.told,
                stderr=self.said,
                start_new_session=True,
            )
        except OSError as error:
            return {"port": 0, "seconds": 0.0, "why": f"cannot start {command[0]}: {error.strerror}"}
        why = f"did not load in {limit:.0f} s"
        while time.monotonic() - started < limit:
            events = self._events()
            if "listening" in events and "ready" in events:
                port = int(events["listening"]["port"])
                return {"port": port, "seconds": time.monotonic() - started, "why": ""}
            if self.process.poll() is not None:
                why = f"ended with exit code {self.process.returncode}"
                break
            leave_if_asked_to(POLL_SECONDS)
        text = self._text()
        self.end()
        return {"port": 0, "seconds": time.monotonic() - started, "why": f"{why}: {_last(text)}"}

    def sample(self) -> dict[str, Any]:
        """Memory of the server and the board in bytes, None if unknown; `code` is set once the server has ended."""
        return {
            "code": self.process.poll() if self.process else None,
            "rss": proc.resident(self.process.pid) if self.process else None,
            "available": proc.memory("MemAvailable"),
            "cmm": proc.cmm("remain"),
            "said": _last(self._text()) if self.process and self.process.poll() is not None else "",
        }

    def stop(self, limit: float) -> dict[str, Any]:
        """Sends SIGTERM; returns the server's exit code (None: it had to be killed) and its last output."""
        if self.process is None:
            raise Refused("bad", "no server is running")
        code = self.process.poll()
        if code is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self.process.wait(limit)
        text = self._text()
        self.end()
        return {"code": code, "traceback": _last(text) if "Traceback (most recent" in text else "", "said": _last(text)}

    def end(self) -> None:
        """Kills the server, if any."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        for file in (self.told, self.said):
            if file is not None:
                file.close()
        self.process, self.told, self.said = None, None, None

    def _events(self) -> dict[str, dict[str, Any]]:
        """The server's events so far, by name."""
        assert self.told is not None
        whole = os.pread(self.told.fileno(), 1 << 16, 0).rpartition(b"\n")[0]
        events = [json.loads(line) for line in whole.splitlines()]
        return {event["event"]: event for event in events}

    def _text(self) -> str:
        """The server's stderr; of a long one, the start and the end."""
        if self.said is None:
            return ""
        length = os.fstat(self.said.fileno()).st_size
        first = os.pread(self.said.fileno(), 1 << 18, 0)
        last = os.pread(self.said.fileno(), 1 << 16, max(length - (1 << 16), len(first)))
        return (first + last).decode("utf-8", "replace")


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it printed nothing"]
    return lines[-1][:SHOWN]


def main(root: str) -> None:
    server = Server(root)
    try:
        answer(server)
    finally:
        server.end()

"""What a soak runs on the board: starts `axrun serve`, tells what it takes, ends it. Sent over SSH like
ci/device/on_board.py.

It reads one JSON object a line and answers each with one. The server ends with it, however it ends. Needs Python 3.9
and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

IDLE_SECONDS = 3600  # without a request, the other side is gone, whatever the network says
POLL_SECONDS = 0.05
SHOWN = 2000  # characters of what the server said
LISTENS = re.compile(r"OpenAI API Server starting on http://[^\s]*:(\d{1,5})$", re.MULTILINE)
LOADED = re.compile(r"^LLM init ok", re.MULTILINE)
CMM = "/proc/ax_proc/mem_cmm_info"


class Refused(Exception):
    """What is asked cannot be done: a kind for the program that asked, and a text."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Server:
    """One `axrun serve` at a time."""

    def __init__(self, root: str) -> None:
        self.home = Path.home()
        self.process: subprocess.Popen[bytes] | None = None
        self.said: IO[bytes] | None = None

    def start(self, command: list[str], limit: float) -> dict[str, Any]:
        """Starts a server and waits until it has loaded: the port it listens on, and the seconds that took.

        Port 0 and `why` where it does not.
        """
        self.end()
        self.said = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the server)
        started = time.monotonic()
        try:
            self.process = subprocess.Popen(
                command,
                cwd=str(self.home),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.said,
                start_new_session=True,
            )
        except OSError as error:
            return {"port": 0, "seconds": 0.0, "why": f"cannot start {command[0]}: {error.strerror}"}
        why = f"did not load in {limit:.0f} s"
        while time.monotonic() - started < limit:
            text = self._text()
            listens = LISTENS.search(text)
            if listens and LOADED.search(text):
                return {"port": int(listens.group(1)), "seconds": time.monotonic() - started, "why": ""}
            if self.process.poll() is not None:
                why = f"ended with exit code {self.process.returncode}"
                break
            if select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
                sys.exit()  # nothing but the end of the input is to come now
        text = self._text()
        self.end()
        return {"port": 0, "seconds": time.monotonic() - started, "why": f"{why}: {_last(text)}"}

    def sample(self) -> dict[str, Any]:
        """Bytes of the server and of the board, None where it does not tell; `code` once the server has ended."""
        status = _read(f"/proc/{self.process.pid}/status") if self.process else ""
        remain = re.search(r"total size.*?remain=(\d+)KB\(", _read(CMM))
        return {
            "code": self.process.poll() if self.process else None,
            "rss": _size(status, "VmRSS"),
            "available": _size(_read("/proc/meminfo"), "MemAvailable"),
            "cmm": int(remain.group(1)) << 10 if remain else None,
            "said": _last(self._text()) if self.process and self.process.poll() is not None else "",
        }

    def stop(self, limit: float) -> dict[str, Any]:
        """Asks the server to end: its exit code (None: it had to be killed), and what it said of a failure."""
        if self.process is None:
            raise Refused("bad", "no server runs")
        code = self.process.poll()
        if code is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self.process.wait(limit)
        text = self._text()
        self.end()
        return {"code": code, "traceback": _last(text) if "Traceback (most recent" in text else "", "said": _last(text)}

    def end(self) -> None:
        """Whatever runs is killed."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self.said is not None:
            self.said.close()
        self.process, self.said = None, None

    def _text(self) -> str:
        """What the server has said, the middle left out when it is much."""
        if self.said is None:
            return ""
        length = os.fstat(self.said.fileno()).st_size
        first = os.pread(self.said.fileno(), 1 << 18, 0)
        last = os.pread(self.said.fileno(), 1 << 16, max(length - (1 << 16), len(first)))
        return (first + last).decode("utf-8", "replace")


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it said nothing"]
    return lines[-1][:SHOWN]


def _size(text: str, name: str) -> int | None:
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found.group(1)) << 10 if found else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8", errors="replace")
    except OSError:
        return ""


def main(root: str) -> None:
    server = Server(root)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit())
    _answer({"ok": "ready"})
    try:
        while select.select([sys.stdin], [], [], IDLE_SECONDS)[0]:
            line = sys.stdin.buffer.readline()
            if not line:
                break
            request = json.loads(line)
            verb = request.pop("do")
            try:
                answer = {"ok": getattr(server, verb)(**request)}
            except Refused as refused:
                answer = {"error": refused.kind, "text": str(refused)}
            _answer(answer)
    finally:
        server.end()


def _answer(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])

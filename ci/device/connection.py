"""A connection to a board over SSH: requests to a program of ci/device/on_board, rsync, and port forwards.

Answers of a board are untrusted data, bounded in size and time, and never executed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shlex
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from axrun.errors import BadInput
from ci.device import bounded, programs, ssh, strict_json
from ci.device.place import Address, Board
from ci.device.ssh import CONNECT_SECONDS, REQUEST_SECONDS, Lost

STALL_SECONDS = 300
RSYNC_SECONDS = 6 * 3600
ANSWER_BYTES = 4 << 20
MOST_SAID = 1 << 20  # bytes kept of rsync's output
NO_PYTHON = 127  # a shell's exit code for "command not found"

INTERPRETER = dict.fromkeys(("found", "found_sha256", "program", "program_sha256", "version"), str)
# type of each verb's answer: a type, (alternatives), [type of entries], {key: type of value}
ANSWERS: Mapping[str, Any] = {
    "facts": {
        **dict.fromkeys(("architecture", "python", "glibc", "root"), str),
        **dict.fromkeys(("rsync", "engine_library", "current"), (str, None)),
        **dict.fromkeys(("memory", "cmm"), (int, None)),
        **dict.fromkeys(("writable", "read_only"), bool),
        "free": int,
        "interpreter": INTERPRETER,
    },
    "survey": {"whole": bool, "into": str, "like": (str, None), "needed": int, "free": int},
    **{key: [str] for key in ("verify", "compiled")},
    "inventory": {
        **dict.fromkeys(("root", "boot"), str),
        "current": (str, None),
        "python": INTERPRETER,
        **{key: [[str]] for key in ("folders", "release", "package", "model")},
    },
    "status": {
        **dict.fromkeys(("user", "host", "system", "kernel"), str),
        **dict.fromkeys(("board", "bsp", "board_id", "chip", "locked", "package", "model", "prompt"), (str, None)),
        **dict.fromkeys(("uptime", "memory_total", "cmm_total", "disk_total"), (int, None)),
        **{key: [[str]] for key in ("temperatures", "devices", "engines")},
        "releases": [str],
    },
    "release": {"engine": str, "prompt": str, "tokens": ([int], None)},
    "ask": {"code": (int, None), "stdout": str, "stderr": str},
    "examine": {"release": str, "code": (int, None), "stdout": str, "stderr": str},
    "switch": (str, None),
    "previous": (str, None),
    "prune": [str],
    "incoming": int,
    "state": {
        "versions": {},
        **dict.fromkeys(("memory_total", "memory", "cmm"), (int, None)),
        **dict.fromkeys(("disk_total", "disk"), int),
    },
    "limits": {"hot": {}, "most": {}, "governor": str},
    "readings": {"degrees": {}, "clocks": {}, "cooling": {}},
    "log": {"text": str, "why": str},
    "start": {"port": int, "seconds": float, "why": str},
    "sample": {**dict.fromkeys(("code", "rss", "available", "cmm"), (int, None)), "said": str},
    "stop": {"code": (int, None), "traceback": str, "said": str},
    **dict.fromkeys(("lock", "keep", "assemble", "back", "drop", "forget_compiled")),
}
NO_SPACE = re.compile(r"No space left on device|Disk quota exceeded")


@dataclass(frozen=True)
class Moved:
    """rsync's statistics: bytes over the wire in both directions, and the total size of the files."""

    wire: int
    size: int


class Connection:
    """A running program on a board. Close it: otherwise the board's lock stays held until it notices the disconnect."""

    def __init__(self, board: Board, at: Address, program: str = programs.RELEASES) -> None:
        """Sends and starts `program`. Raises BadInput if the board is unreachable, unknown or has no Python 3.9."""
        self.board, self.at = board, at
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the connection)
        self._unread = b""
        self._process = subprocess.Popen(
            [*self._shell(), programs.command(board.root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=ssh.environment(board),
        )
        try:
            self._send(programs.sent(program))
            self._receive("start", CONNECT_SECONDS + REQUEST_SECONDS)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the program's input, which ends it and frees the board's lock."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._said.close()

    def call(self, verb: str, seconds: float = REQUEST_SECONDS, /, **arguments: Any) -> Any:
        """Calls a verb of the program; the answer has the type given in ANSWERS.

        Raises BadInput if the program refuses, Lost without an answer or for one of another type.
        """
        self._send(json.dumps({"do": verb, **arguments}).encode() + b"\n")
        answer = self._receive(verb, seconds)
        if not _is(answer, ANSWERS[verb]):
            raise Lost(f"{self.board.name} answered {verb} with {answer!a:.80}, which is not a valid answer")
        return answer

    def send(self, source: Path, into: str, like: str | None) -> Moved:
        """Mirrors `source` to the board's folder `into`; files that `like` already has are hard-linked, not sent.

        Raises BadInput for a full disk, Lost if the connection broke; a partial transfer is kept.
        """
        command = [
            *("rsync", "--recursive", "--checksum", "--delete", "--stats", "--partial-dir=.rsync-partial"),
            *("--chmod=D0755,Fu+rw,Fgo+r,Fgo-w", f"--timeout={STALL_SECONDS}", "--protect-args"),
            *([f"--link-dest={like}"] if like else []),
            *("--rsh", shlex.join(ssh.command(self.at))),
            *(f"{source}/", f"{self.at.host}:{into}/"),
        ]
        command = [*ssh.mortal("KILL"), *command]  # it must not outlive the deploy that holds the lock
        try:
            done = bounded.run(
                command, seconds=RSYNC_SECONDS, most=MOST_SAID, environment=ssh.environment(self.board), drains=True
            )
        except FileNotFoundError:
            raise BadInput("there is no rsync on this machine: apt-get install rsync") from None
        if done.code is None:
            raise Lost(f"{self.board.name}: rsync did not finish within {RSYNC_SECONDS} s")
        stats, said = (text.decode("utf-8", "replace") for text in (done.stdout, done.stderr))
        if done.code:
            if NO_SPACE.search(said):
                raise BadInput(f"the disk of {self.board.name} became full during the transfer of {source.name}")
            raise Lost(self._meaning(said) or f"rsync to {self.board.name}: {ssh.last_line(said)}")
        numbers = [_number(stats, name) for name in ("Total bytes sent", "Total bytes received", "Total file size")]
        return Moved(numbers[0] + numbers[1], numbers[2])

    def forwarded(self, port: int) -> AbstractContextManager[int]:
        """Forwards a local loopback port to the board's `port`. Raises Lost if that fails."""
        return ssh.forwarded(self.board, self.at, port)

    def _shell(self) -> list[str]:
        """The ssh command that runs a command line on the board."""
        return [*ssh.command(self.at), self.at.host]

    def _send(self, data: bytes) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # _receive reports the missing answer, with ssh's message
            self._process.stdin.write(data)
            self._process.stdin.flush()

    def _receive(self, verb: str, seconds: float) -> Any:
        line = self._line(verb, seconds)
        try:
            answer = strict_json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or not ({"ok"} <= answer.keys() or {"error", "text"} <= answer.keys()):
            raise Lost(
                f"{self.board.name} answered {verb} with {line[:80]!r}: does its shell print something at login?"
            )
        if "ok" in answer:
            return answer["ok"]
        kind, text = str(answer["error"]), str(answer["text"])[:300]
        refusals = {
            "locked": f"{text!a} is deploying to {self.board.name}\nWait for it, or ask them to stop.",
            "old": f"{self.board.name} has Python {text}; 3.9 or newer is needed",
            "space": f"the disk of {self.board.name} is full ({text})",
        }
        raise BadInput(refusals.get(kind, f"{self.board.name}: {verb}: {text}"))

    def _line(self, verb: str, seconds: float) -> bytes:
        assert self._process.stdout
        pipe, deadline = self._process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                raise Lost(f"{self.board.name} did not answer {verb} in {seconds:.0f} s")
            data = os.read(pipe, 1 << 16)
            if not data:
                raise self._ended(verb)
            self._unread += data
            if len(self._unread) > ANSWER_BYTES:
                raise Lost(f"{self.board.name} answered {verb} with more than {ANSWER_BYTES >> 20} MB")
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _ended(self, verb: str) -> BadInput | Lost:
        """The error for a missing answer, from ssh's exit code and message."""
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            code = -1
        self._said.seek(0)
        said = self._said.read(1 << 16).decode("utf-8", "replace")
        if verb == "start" and code == NO_PYTHON:
            return BadInput(f"{self.board.name} has no python3; 3.9 or newer is needed: apt-get install python3, there")
        meaning = self._meaning(said) if code == 255 else ""
        if meaning and verb == "start":
            return BadInput(meaning)
        return Lost(meaning or f"{self.board.name} was lost during {verb}: {ssh.last_line(said)} (exit code {code})")

    def _meaning(self, said: str) -> str:
        return ssh.meaning(self.board, self.at, said)


def _is(value: Any, kind: Any) -> bool:
    """Whether a value matches a type of ANSWERS."""
    if isinstance(kind, tuple):
        return any(_is(value, one) for one in kind)
    if isinstance(kind, list):
        return type(value) is list and all(_is(entry, kind[0]) for entry in value)
    if isinstance(kind, Mapping):
        return type(value) is dict and all(key in value and _is(value[key], one) for key, one in kind.items())
    return value is None if kind is None else type(value) is kind


def _number(stats: str, name: str) -> int:
    found = re.search(rf"^{name}: ([\d,.]+)", stats, re.M)
    return int(re.sub(r"\D", "", found[1])) if found else 0

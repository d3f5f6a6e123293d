"""The current release's axrun on a board, from here: a question, a server, each ended with the command that asked.

What the board writes is shown as it comes, bounded, control characters made visible.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from axrun.errors import BadInput, CheckFailed
from ci.device import commands
from ci.device.connection import ssh_command, ssh_environment, ssh_meaning
from ci.device.place import Address, Board
from ci.device.progress import Say

PROGRAM = Path(__file__).resolve().parent / "on_board_run.py"
NO_RELEASE = 66  # its exit code where nothing is deployed
SSH_FAILED = 255
HEARTBEAT_SECONDS = 10.0
MOST_SHOWN = 16 << 20  # characters of one stream
END_SECONDS = 45.0  # for both ends to be over
FORWARD_SECONDS = 15.0
LOAD_SECONDS = 1800.0
STARTED = re.compile(r"^OpenAI API Server starting on http://127\.0\.0\.1:(\d{1,5})$")
START = """import sys
size = int(sys.stdin.buffer.readline())
exec(compile(sys.stdin.buffer.read(size), "on_board_run.py", "exec"))
"""


class Attended:
    """axrun on the board, running; close it, or leave its block, and it ends there."""

    def __init__(self, board: Board, at: Address, words: Sequence[str], given: str = "") -> None:
        self.board, self.at = board, at
        self.process = subprocess.Popen(
            [*mortal(), *ssh_command(at), at.host, f"exec python3 -I -S -u -c {shlex.quote(START)}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=ssh_environment(board),
            start_new_session=True,  # Ctrl-C is for this side, which ends the other in order
        )
        self.tail: list[str] = []
        program = PROGRAM.read_bytes()
        request = json.dumps({"root": board.root, "words": list(words), "input": given}).encode()
        self._send(b"%d\n%s%s\n" % (len(program), program, request))
        threading.Thread(target=self._beat, daemon=True).start()

    def __enter__(self) -> Attended:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def show(self, stream: IO[bytes] | None, into: Callable[[str], object]) -> threading.Thread:
        """Passes on what a stream brings, in a thread that ends with the stream."""

        def run() -> None:
            assert stream
            for piece in pieces(stream):
                self.tail = [*self.tail, *piece.splitlines()][-20:]
                into(piece)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def wait(self) -> int:
        """axrun's exit code. Raises BadInput, CheckFailed for a board that has no release or was lost."""
        code = self.process.wait()
        if code == NO_RELEASE:
            first = commands.invoke("deploy", "--board", self.board.argument)
            raise BadInput(f"{self.board.name} has no release\nFirst: {first}")
        if code == SSH_FAILED:
            said = "\n".join(self.tail)
            raise CheckFailed(ssh_meaning(self.board, self.at, said) or f"{self.board.name} was lost: {said[-200:]!a}")
        return code

    def close(self) -> None:
        """The end of its input ends axrun; what does not end in time is left to the board's own patience."""
        if self.process.stdin:
            with contextlib.suppress(OSError, ValueError):
                self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_SECONDS)
        stop(self.process)

    def _beat(self) -> None:
        while self.process.poll() is None:
            time.sleep(HEARTBEAT_SECONDS)
            if not self._send(b"\n"):
                return

    def _send(self, data: bytes) -> bool:
        assert self.process.stdin
        try:
            self.process.stdin.write(data)
            self.process.stdin.flush()
        except (OSError, ValueError):  # gone, or closed here
            return False
        return True


def ask(board: Board, at: Address, prompt: str, out: IO[str], err: IO[str], words: Sequence[str] = ()) -> int:
    """The current release's answer to `prompt`, as it is written; what axrun says of it goes to `err`."""
    given = ["run", "--prompt", "-", "--engine", board.engine, *words]
    with Attended(board, at, given, prompt) as running:
        shown = [running.show(running.process.stdout, _into(out)), running.show(running.process.stderr, _into(err))]
        code = running.wait()
        for thread in shown:
            thread.join(END_SECONDS)
    return code


@contextlib.contextmanager
def served(board: Board, at: Address, port: int, say: Say, words: Sequence[str] = ()) -> Iterator[tuple[str, Attended]]:
    """The current release's server and a forward to it: its URL here. Both end with the block.

    Raises BadInput, CheckFailed when it does not come up.
    """
    with Attended(board, at, ["serve", "--host", "127.0.0.1", "--port", "0", "--engine", board.engine, *words]) as far:
        there = _announced(far, say)
        here = port or _free()
        forward = subprocess.Popen(
            [
                *(*mortal(), *ssh_command(at), "-N", "-o", "ExitOnForwardFailure=yes"),
                *("-L", f"127.0.0.1:{here}:127.0.0.1:{there}", at.host),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=ssh_environment(board),
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{here}"
            _answers(board, url, forward, far)
            yield url, far
        finally:
            stop(forward)


def _announced(far: Attended, say: Say) -> int:
    """The port on the board, once the server says it; everything it says is passed on."""
    found: list[int] = []
    told = threading.Event()

    def line(text: str) -> None:
        for each in text.splitlines():
            if match := STARTED.match(each):
                found.append(int(match[1]))
                told.set()
            elif each:
                say(f"  {far.board.name}: {each}")

    thread = far.show(far.process.stderr, _lines(line))
    far.show(far.process.stdout, lambda text: None)
    deadline = time.monotonic() + LOAD_SECONDS
    while not told.wait(0.1):
        if far.process.poll() is not None:
            thread.join(5)
            code = far.wait()
            raise CheckFailed(f"axrun serve ended on {far.board.name} with exit code {code}: {_last(far.tail)}")
        if time.monotonic() > deadline:
            raise CheckFailed(f"axrun serve on {far.board.name} did not start in {LOAD_SECONDS:.0f} s")
    return found[0]


def _answers(board: Board, url: str, forward: subprocess.Popen[bytes], far: Attended) -> None:
    """Returns when the server answers through the forward, its model loaded. Raises CheckFailed."""
    deadline, loading = time.monotonic() + FORWARD_SECONDS, time.monotonic() + LOAD_SECONDS
    while True:
        if forward.poll() is not None:
            said = (forward.stderr.read() if forward.stderr else b"").decode("utf-8", "replace")
            raise CheckFailed(f"no forward to {board.name}: {_last(said.splitlines())}\nDoes its sshd allow them?")
        if far.process.poll() is not None:
            raise CheckFailed(f"axrun serve ended on {board.name}: {_last(far.tail)}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except urllib.error.HTTPError:  # it answers; its model is not loaded yet
            deadline = loading
        except OSError:
            pass
        if time.monotonic() > deadline:
            raise CheckFailed(f"{url} does not answer, though axrun serves on {board.name}: does its sshd forward?")
        time.sleep(0.1)


def pieces(stream: IO[bytes]) -> Iterator[str]:
    """A board's text as it comes, safe for a terminal; MOST_SHOWN characters at most."""
    decode, shown = codecs.getincrementaldecoder("utf-8")("replace").decode, 0
    while data := os.read(stream.fileno(), 1 << 16):
        text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in decode(data) if c != "\r")
        shown += len(text)
        if shown > MOST_SHOWN:
            yield "\n[the board writes without end: cut off]\n"
            return
        if text:
            yield text


def mortal() -> list[str]:
    """Words before a command that shall not outlive this process, however that ends."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM", "--"] if setpriv else []


def stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _into(stream: IO[str]) -> Callable[[str], None]:
    def write(text: str) -> None:
        stream.write(text)
        stream.flush()

    return write


def _lines(line: Callable[[str], None]) -> Callable[[str], None]:
    """Whole lines out of pieces."""
    rest = ""

    def take(text: str) -> None:
        nonlocal rest
        *whole, rest = (rest + text).split("\n")
        for each in whole:
            line(each)

    return take


def _free() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _last(lines: Sequence[str]) -> str:
    said = [line.strip() for line in lines if line.strip()]
    errors = [line for line in said if line.startswith("error:")]
    return (errors or said or ["it said nothing"])[-1][:300]

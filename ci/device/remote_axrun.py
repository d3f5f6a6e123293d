"""Runs the current release's axrun on a board, as a prompt or a server; it ends when the local command ends.

The board's output is streamed, bounded, with control characters replaced.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import IO

from axrun.errors import BadInput, CheckFailed
from ci.device import commands, programs, ssh, strict_json
from ci.device.place import Address, Board
from ci.device.progress import Say

NO_RELEASE = 66  # exit code if nothing is deployed
HEARTBEAT_SECONDS = 10.0
MOST_SHOWN = 16 << 20  # characters of one stream
END_SECONDS = 45.0  # for both ends to finish
FORWARD_SECONDS = 15.0
LOAD_SECONDS = 1800.0


class RemoteAxrun:
    """A running axrun on the board. Closing it, or leaving the `with` block, ends it there."""

    def __init__(self, board: Board, at: Address, words: Sequence[str], given: str = "") -> None:
        self.board, self.at = board, at
        self.process = subprocess.Popen(
            [*ssh.mortal(), *ssh.command(at), at.host, programs.command()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=ssh.environment(board),
            start_new_session=True,  # Ctrl-C goes to this side only, which then stops the other
        )
        self.tail: list[str] = []
        request = json.dumps({"root": board.root, "words": list(words), "input": given}).encode()
        self._send(programs.sent(programs.ATTEND) + request + b"\n")
        threading.Thread(target=self._beat, daemon=True).start()

    def __enter__(self) -> RemoteAxrun:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def show(self, stream: IO[bytes] | None, into: Callable[[str], object]) -> threading.Thread:
        """Forwards a stream, in a thread that ends with the stream."""

        def run() -> None:
            assert stream
            for piece in pieces(stream):
                self.tail = [*self.tail, *piece.splitlines()][-20:]
                into(piece)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def wait(self) -> int:
        """axrun's exit code. Raises BadInput if the board has no release, CheckFailed if the connection was lost."""
        code = self.process.wait()
        if code == NO_RELEASE:
            first = commands.invoke("deploy", "--board", self.board.argument)
            raise BadInput(f"{self.board.name} has no release\nFirst: {first}")
        if code == ssh.FAILED:
            said = "\n".join(self.tail)
            raise CheckFailed(ssh.meaning(self.board, self.at, said) or f"{self.board.name} was lost: {said[-200:]!a}")
        return code

    def close(self) -> None:
        """Closes its input, which ends axrun. If it does not end in time, the board's own timeout ends it."""
        if self.process.stdin:
            with contextlib.suppress(OSError, ValueError):
                self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_SECONDS)
        ssh.stop(self.process)

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
        except (OSError, ValueError):  # the connection is gone, or closed by us
            return False
        return True


def ask(board: Board, at: Address, prompt: str, out: IO[str], err: IO[str], words: Sequence[str] = ()) -> int:
    """Streams the current release's answer to `prompt` to `out`, and axrun's stderr to `err`; returns its exit code."""
    given = ["run", "--prompt", "-", "--engine", board.engine, *words]
    console = Console(_into(out), _into(err))
    try:
        with RemoteAxrun(board, at, given, prompt) as running:
            shown = [
                running.show(running.process.stdout, console.answer),
                running.show(running.process.stderr, console.remark),
            ]
            code = running.wait()
            for thread in shown:
                thread.join(END_SECONDS)
    finally:
        console.finish()
    return code


class Console:
    """An answer and the remarks on it, shown on one terminal: remarks wait until the answer is at the end of a line.

    They arrive as two streams of a connection, which keeps no order between them.
    """

    def __init__(self, out: Callable[[str], None], err: Callable[[str], None]) -> None:
        self._out, self._err = out, err
        self._lock, self._inside_line, self._waiting = threading.Lock(), False, list[str]()

    def answer(self, text: str) -> None:
        with self._lock:
            self._out(text)
            self._inside_line = not text.endswith("\n")
            if not self._inside_line:
                self._release()

    def remark(self, text: str) -> None:
        with self._lock:
            self._waiting.append(text)
            if not self._inside_line:
                self._release()

    def finish(self) -> None:
        """Shows the remarks that still wait: the connection may be lost inside a line."""
        with self._lock:
            if self._inside_line and self._waiting:
                self._waiting.insert(0, "\n")
            self._release()

    def _release(self) -> None:
        for text in self._waiting:
            self._err(text)
        self._waiting.clear()


@contextlib.contextmanager
def served(
    board: Board, at: Address, port: int, say: Say, words: Sequence[str] = ()
) -> Iterator[tuple[str, RemoteAxrun]]:
    """Runs the current release's server and a port forward; yields the local URL. Both end with the block.

    Raises BadInput, or CheckFailed if the server does not start.
    """
    given = ["serve", "--json", "--host", "127.0.0.1", "--port", "0", "--engine", board.engine, *words]
    with RemoteAxrun(board, at, given) as far, ssh.forwarded(board, at, _ready(far, say), port) as here:
        url = f"http://127.0.0.1:{here}"
        _answers(board, url, far)
        yield url, far


def _ready(far: RemoteAxrun, say: Say) -> int:
    """Waits until the model is loaded and returns the port on the board; forwards the server's messages."""
    ports: list[int] = []
    ready = threading.Event()

    def announced(line: str) -> None:
        try:
            event = strict_json.loads(line)
            if event["event"] == "listening":
                ports.append(int(event["port"]))
            elif event["event"] == "ready" and ports:
                ready.set()
        except (ValueError, KeyError, TypeError):
            say(f"  {far.board.name}: {line}")

    thread = far.show(far.process.stderr, _lines(lambda line: say(f"  {far.board.name}: {line}") if line else None))
    far.show(far.process.stdout, _lines(announced))
    deadline = time.monotonic() + LOAD_SECONDS
    while not ready.wait(0.1):
        if far.process.poll() is not None:
            thread.join(5)
            code = far.wait()
            raise CheckFailed(f"axrun serve ended on {far.board.name} with exit code {code}: {_last(far.tail)}")
        if time.monotonic() > deadline:
            raise CheckFailed(f"axrun serve on {far.board.name} did not start in {LOAD_SECONDS:.0f} s")
    return ports[0]


def _answers(board: Board, url: str, far: RemoteAxrun) -> None:
    """Waits until the server answers through the forward. Raises CheckFailed."""
    deadline = time.monotonic() + FORWARD_SECONDS
    while True:
        if far.process.poll() is not None:
            raise CheckFailed(f"axrun serve ended on {board.name}: {_last(far.tail)}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        if time.monotonic() > deadline:
            raise CheckFailed(f"{url} does not answer, though axrun serves on {board.name}: does its sshd forward?")
        time.sleep(0.1)


def pieces(stream: IO[bytes]) -> Iterator[str]:
    """A board's output as it arrives, safe for a terminal, at most MOST_SHOWN characters."""
    decode, shown = codecs.getincrementaldecoder("utf-8")("replace").decode, 0
    while data := os.read(stream.fileno(), 1 << 16):
        text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in decode(data) if c != "\r")
        shown += len(text)
        if shown > MOST_SHOWN:
            yield "\n[too much output from the board: truncated]\n"
            return
        if text:
            yield text


def _into(stream: IO[str]) -> Callable[[str], None]:
    def write(text: str) -> None:
        stream.write(text)
        stream.flush()

    return write


def _lines(line: Callable[[str], None]) -> Callable[[str], None]:
    """Reassembles chunks into whole lines."""
    rest = ""

    def take(text: str) -> None:
        nonlocal rest
        *whole, rest = (rest + text).split("\n")
        for each in whole:
            line(each)

    return take


def _last(lines: Sequence[str]) -> str:
    said = [line.strip() for line in lines if line.strip()]
    errors = [line for line in said if line.startswith("error:")]
    return (errors or said or ["it printed nothing"])[-1][:300]

"""Runs a command and bounds its output while reading it, so that a flood costs no memory."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO

BLOCK = 1 << 16
REST_SECONDS = 1.0  # for reading the rest of the output after the command ended
END_SECONDS = 5.0  # for a killed command to end
TAIL = 1 << 16  # last bytes of stderr that are kept


@dataclass(frozen=True)
class Done:
    """`code` is None for a command that was killed, by the timeout or because it `flooded` stdout."""

    code: int | None
    stdout: bytes
    stderr: bytes
    flooded: bool = False


def run(
    command: Sequence[str],
    *,
    seconds: float,
    most: int,
    environment: Mapping[str, str] | None = None,
    stdin: IO[bytes] | None = None,
    drains: bool = False,
) -> Done:
    """Runs a command in its own session; keeps up to `most` bytes of stdout and the end of stderr.

    A command that prints more is killed; with `drains`, the last `most` bytes are kept instead. Returns when the
    command ends, even if a background process keeps the pipes open. Raises OSError if it cannot be started.
    """
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=stdin or subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout
    assert process.stderr
    out, err = _Kept(most), _Kept(TAIL)
    deadline = time.monotonic() + seconds
    flooded, rest = False, 0.0
    try:
        with selectors.DefaultSelector() as pipes:
            for pipe, kept in ((process.stdout, out), (process.stderr, err)):
                os.set_blocking(pipe.fileno(), False)
                pipes.register(pipe, selectors.EVENT_READ, kept)
            while not flooded and time.monotonic() < deadline:
                ended = process.poll() is not None
                if ended and not rest:  # a background process may keep writing
                    rest = deadline = min(deadline, time.monotonic() + REST_SECONDS)
                found = pipes.select(0 if ended else 0.05) if pipes.get_map() else []
                read = [_read(pipes, key.fileobj, key.data) for key, _ in found]
                flooded = out.dropped and not drains
                if ended and not any(read):
                    break
                if not pipes.get_map() and not ended:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(max(0.0, deadline - time.monotonic()))
        code = None if flooded else process.poll()
    finally:
        if process.poll() is None:
            _kill(process)
        process.stdout.close()
        process.stderr.close()
    return Done(code, out.bytes(), err.bytes(), flooded)


class _Kept:
    """The end of a stream."""

    def __init__(self, most: int) -> None:
        self._most, self._size = most, 0
        self._blocks: deque[bytes] = deque()
        self.dropped = False

    def add(self, data: bytes) -> None:
        self._blocks.append(data)
        self._size += len(data)
        self.dropped = self.dropped or self._size > self._most
        while self._size - len(self._blocks[0]) >= self._most:
            self._size -= len(self._blocks.popleft())

    def bytes(self) -> bytes:
        return b"".join(self._blocks)[-self._most :]


def _read(pipes: selectors.BaseSelector, pipe: object, kept: _Kept) -> int:
    """Reads what is available and returns its size; unregisters a closed pipe."""
    try:
        data = os.read(pipe.fileno(), BLOCK)  # type: ignore[attr-defined]
    except BlockingIOError:
        return 0
    if data:
        kept.add(data)
    else:
        pipes.unregister(pipe)  # type: ignore[arg-type]
    return len(data)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills the command and its session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)

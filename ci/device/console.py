"""python -m ci.device.console BOARD FILE: records a board's serial console into a file with labgrid, until terminated.

It needs only a serial port in the YAML (SerialPort, NetworkSerialPort, or that of a farm's place). The emulated board
writes its console to a file, which is fed into a pseudo-terminal so that the same driver reads it. The recording is
printable, bounded, and has a timestamp per line.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tty
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from axrun.errors import BadInput, Failure
from ci.device import place
from ci.device.place import Board

PR_SET_PDEATHSIG = 1
ROOT = Path(__file__).resolve().parents[2]
BEFORE = "console.before.log"
NAME = "console.log"
MOST, LONGEST = 2 << 20, 400  # bytes of the file, characters of a line
BLOCK = 1024  # bytes at a time
TAIL = 40  # lines that a report shows
IDLE_SECONDS, RETRY_SECONDS, POLL_SECONDS = 1.0, 2.0, 0.1
FLUSH_SECONDS, END_SECONDS = 0.6, 5.0
ESCAPES = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-_])")
NO_PORT = "no serial console: {yaml} names none"


class Log:
    """A console log file; of more than MOST bytes it keeps the end."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._line, self._size, self._left_out = b"", 0, 0
        self.file.write_bytes(b"")

    def add(self, data: bytes) -> None:
        """Adds received bytes; complete lines are written."""
        *lines, self._line = (self._line + data).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            self._write(line)
        if len(self._line) > 4 * LONGEST:
            self.flush()

    def flush(self) -> None:
        """Writes an incomplete line, such as a prompt."""
        if self._line:
            self._write(self._line)
        self._line = b""

    def say(self, text: str) -> None:
        """Adds a line of ours, in brackets."""
        self.flush()
        self._write(f"[{text}]".encode())

    def _write(self, line: bytes) -> None:
        shown = printable(line)
        if not shown:
            return
        at = datetime.datetime.now(datetime.UTC).strftime("%H:%M:%S.%f")[:10]
        data = f"{at} {shown}\n".encode()
        with self.file.open("ab") as stream:
            stream.write(data)
        self._size += len(data)
        if self._size > MOST:
            kept = self.file.read_bytes()[-MOST // 2 :].partition(b"\n")[2]
            self._left_out += self._size - len(kept)
            first = f"[{self._left_out} earlier bytes were dropped]\n".encode()
            self.file.write_bytes(first + kept)
            self._size = len(first) + len(kept)


def printable(line: bytes) -> str:
    """The line without terminal escapes and control characters."""
    text = ESCAPES.sub(b"", line).decode("utf-8", "replace").replace("\t", "    ").rstrip()
    return "".join(c if c.isprintable() else "�" for c in text[:LONGEST])


def tail(file: Path) -> str:
    """The last lines of a recorded console; empty if there is none."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - TAIL * LONGEST))
            lines = stream.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return "\n".join(printable(line.encode()) for line in lines[-TAIL:])


def start(board: Board, file: Path) -> subprocess.Popen[bytes]:
    """Starts recording into `file`, in a process that ends with this one. Call it before power-on."""
    file.write_bytes(b"")
    if board.emulated:  # skip the output since the last power-on; the next start makes a new file
        with contextlib.suppress(OSError):
            os.replace(board.state / NAME, board.state / BEFORE)
    return subprocess.Popen(
        [sys.executable, "-m", "ci.device.console", str(board.yaml), str(file)],
        cwd=ROOT,
        env={**os.environ, **board.variables()},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stops recording; everything received by now is in the file."""
    process.terminate()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def keep(board: Board, log: Log, ended: threading.Event) -> None:
    """Records until `ended`; reopens a port that disappears. Raises BadInput for a board without a console."""
    from pexpect import TIMEOUT
    from serial import SerialException

    with driver(board, ended) as (serial, follow):
        last = time.monotonic()
        while not ended.is_set():
            try:
                log.add(_read(serial))
                last = time.monotonic()
            except TIMEOUT:
                if time.monotonic() - last > IDLE_SECONDS:
                    log.flush()
                ended.wait(POLL_SECONDS)
            except (SerialException, OSError) as error:
                log.say(f"lost the serial port: {error}")
                with contextlib.suppress(Exception):
                    serial.close()
                while not ended.wait(RETRY_SECONDS):
                    with contextlib.suppress(SerialException, OSError):
                        serial.open()
                        log.say("the serial port is back")
                        break
        if follow is not None:
            follow.join(END_SECONDS)  # it still feeds what was written before `ended`
        with contextlib.suppress(TIMEOUT, SerialException, OSError):
            while True:
                log.add(_read(serial))
        log.flush()


def _read(serial: Any) -> bytes:
    """Available bytes. Raises pexpect's TIMEOUT if there are none, SerialException or OSError for a lost port.

    Does not wait for more: pyserial would drop data already read from a TCP port if it is closed meanwhile.
    """
    waiting = serial.serial.in_waiting  # at most 1 for a TCP port
    data = serial.read(size=waiting, timeout=POLL_SECONDS) if waiting > 1 else serial.read(size=BLOCK, timeout=0.0)
    return bytes(data)


@contextlib.contextmanager
def driver(board: Board, ended: threading.Event) -> Iterator[tuple[Any, threading.Thread | None]]:
    """labgrid's active SerialDriver of a board, and the thread that feeds an emulated board's console.

    Raises BadInput if there is no port or it cannot be opened.
    """
    from labgrid.driver import SerialDriver
    from labgrid.exceptions import NoDriverFoundError, NoSupplierFoundError
    from labgrid.resource import NetworkSerialPort, RawSerialPort, SerialPort
    from serial import SerialException

    with place.target(board) as target, contextlib.ExitStack() as last:
        speaks = None
        try:
            found = target.get_driver("SerialDriver", activate=False)
        except (NoDriverFoundError, NoSupplierFoundError):
            if not any(isinstance(entry, (SerialPort, NetworkSerialPort)) for entry in target.resources):
                if not board.emulated:
                    raise BadInput(NO_PORT.format(yaml=board.yaml.name)) from None
                speaks, listens = last.enter_context(pseudo_terminal())
                RawSerialPort(target, "console", port=listens)
            found = SerialDriver(target, "console")
        try:
            target.activate(found)
        except (SerialException, OSError) as error:
            raise BadInput(f"no serial console: {error}") from None
        follow = None
        if speaks is not None:  # only now: pyserial flushes its input when it opens a port
            follow = last.enter_context(following(board.state / NAME, speaks, ended))
        yield found, follow


@contextlib.contextmanager
def pseudo_terminal() -> Iterator[tuple[int, str]]:
    """The writing side's file descriptor, and the path of the reading side."""
    master, slave = os.openpty()
    tty.setraw(slave)
    try:
        yield master, os.ttyname(slave)
    finally:
        os.close(slave)
        os.close(master)


@contextlib.contextmanager
def following(file: Path, into: int, ended: threading.Event) -> Iterator[threading.Thread]:
    """Copies a growing file into a terminal, and restarts if the file is truncated or replaced."""
    follow = threading.Thread(target=_follow, args=(file, into, ended), daemon=True)
    follow.start()
    try:
        yield follow
    finally:
        ended.set()
        follow.join(END_SECONDS)


def _follow(file: Path, into: int, ended: threading.Event) -> None:
    at = 0
    while True:
        over = ended.is_set()  # one more round reads the rest
        try:
            with file.open("rb") as stream:
                at = at if at <= os.fstat(stream.fileno()).st_size else 0
                stream.seek(at)
                while data := stream.read(1024):
                    os.write(into, data)
                    at += len(data)
        except OSError:
            at = 0
        if over:
            return
        ended.wait(POLL_SECONDS)


def main(argv: Sequence[str]) -> int:
    name, file = argv
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    ended, log = threading.Event(), Log(Path(file))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: ended.set())
    try:
        keep(place.find(name), log, ended)
    except Failure as failure:
        log.say(str(failure).partition("\n")[0])
        return failure.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

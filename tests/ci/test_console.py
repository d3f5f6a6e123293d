"""The serial console through labgrid's driver: over TCP like ser2net, and from the emulated board's file."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from axrun.errors import BadInput
from ci.device import console, place
from ci.device.console import Log
from ci.device.place import Board

ROOT = Path(__file__).resolve().parents[2]
BOOT = b"\x1b[2J\x1b[32mU-Boot 2020.04\x1b[0m\r\nDRAM:\t8 GiB\r\nlogin: "


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def lines(file: Path) -> list[str]:
    """Without the time."""
    return [line.partition(" ")[2] for line in file.read_text().splitlines()]


@contextlib.contextmanager
def kept(board: Board, file: Path) -> Iterator[None]:
    process = console.start(board, file)
    try:
        yield
    finally:
        console.stop(process)


def greet(link: socket.socket, file: Path) -> None:
    """pyserial throws away what comes while it opens a TCP port: says nothing else before that is over."""
    while "tick" not in file.read_text():
        link.sendall(b"tick\n")
        time.sleep(0.02)


@contextlib.contextmanager
def server(say: Callable[[socket.socket], None]) -> Iterator[int]:
    """A port that says something to whoever connects, as ser2net does."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    link, _ = listener.accept()
                    with link:
                        say(link)

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def desk(folder: Path, resource: str) -> Board:
    """A board with a serial port in its YAML, and no driver for it."""
    yaml = folder / "desk.yaml"
    text = (place.BOARDS / "ax650.yaml").read_text()
    yaml.write_text(text.replace("      NetworkPowerPort:", f"      {resource}\n      NetworkPowerPort:"))
    return dataclasses.replace(place.find(str(yaml)), state=folder)


def test_a_port_of_the_network_is_kept(tmp_path: Path) -> None:
    said, file = threading.Event(), tmp_path / "console.log"

    def say(link: socket.socket) -> None:
        greet(link, file)
        link.sendall(BOOT)
        said.wait(60)

    with server(say) as port:
        board = desk(tmp_path, f"NetworkSerialPort: {{host: 127.0.0.1, port: {port}, protocol: raw}}")
        with kept(board, file):
            until(lambda: "login:" in file.read_text())
        said.set()
    assert [line for line in lines(file) if line != "tick"] == ["U-Boot 2020.04", "DRAM:    8 GiB", "login:"]
    assert console.tail(file).endswith(" login:")


def test_a_port_that_goes_away_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "RETRY_SECONDS", 0.05)
    ended, log = threading.Event(), Log(tmp_path / "console.log")

    def say(link: socket.socket) -> None:
        with contextlib.suppress(OSError):
            greet(link, log.file)
            for _ in range(100):
                link.sendall(b"after\n" if "lost the serial port" in log.file.read_text() else b"before\n")
                time.sleep(0.01)

    with server(say) as port:
        board = desk(tmp_path, f"NetworkSerialPort: {{host: 127.0.0.1, port: {port}, protocol: raw}}")
        thread = threading.Thread(target=console.keep, args=(board, log, ended))
        thread.start()
        until(lambda: "after" in log.file.read_text())
        ended.set()
        thread.join(30)
    seen = lines(log.file)
    assert seen.index("before") < seen.index("[the serial port is back]") < seen.index("after")
    assert any(line.startswith("[lost the serial port: ") for line in seen)


def test_the_emulated_boards_file_comes_by_the_same_driver(tmp_path: Path) -> None:
    """Also if the file is replaced, as by a power cycle."""
    board = dataclasses.replace(place.find("virtual"), state=tmp_path / "state")
    board.state.mkdir()
    said, file = board.state / "console.log", tmp_path / "console.log"
    with kept(board, file):
        said.write_bytes(b"before the power cycle\nand a longer line than what comes after it\n")
        until(lambda: "longer" in file.read_text())
        said.write_bytes(b"Server listening\n")
        until(lambda: "Server listening" in file.read_text())
        with said.open("ab") as stream:
            stream.write(b"Accepted \xff\x00\x07publickey")
    assert lines(file) == [
        "before the power cycle",
        "and a longer line than what comes after it",
        "Server listening",
        "Accepted ���publickey",
    ]


def test_console_output_before_the_night_is_dropped(tmp_path: Path) -> None:
    board = dataclasses.replace(place.find("virtual"), state=tmp_path / "state")
    board.state.mkdir()
    (board.state / "console.log").write_bytes(b"of the session before\n")
    process = console.start(board, tmp_path / "console.log")
    assert not (board.state / "console.log").exists()
    console.stop(process)


def test_a_board_without_a_console_says_so(tmp_path: Path) -> None:
    board = dataclasses.replace(place.find("ax650"), state=tmp_path)
    process = console.start(board, tmp_path / "console.log")
    assert process.wait(60) == BadInput.exit_code
    assert lines(tmp_path / "console.log") == ["[no serial console: ax650.yaml names none]"]


def test_a_missing_serial_port_is_an_error(tmp_path: Path) -> None:
    board = desk(tmp_path, f"RawSerialPort: {{port: {tmp_path}/ttyUSB7}}")
    process = console.start(board, tmp_path / "console.log")
    assert process.wait(60) == BadInput.exit_code
    assert lines(tmp_path / "console.log")[0].startswith("[no serial console: Could not open serial port")


def test_it_ends_when_who_started_it_is_killed(tmp_path: Path) -> None:
    board = dataclasses.replace(place.find("virtual"), state=tmp_path)
    code = (
        "import sys, dataclasses; from pathlib import Path; from ci.device import console, place\n"
        "board = dataclasses.replace(place.find('virtual'), state=Path(sys.argv[1]))\n"
        "print(console.start(board, Path(sys.argv[1]) / 'kept.log').pid, flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(board.state)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout
    pid = int(holder.stdout.readline())
    (tmp_path / "console.log").write_bytes(b"hello\n")
    until(lambda: "hello" in (tmp_path / "kept.log").read_text())
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    until(lambda: not _runs(pid))


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_console_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "MOST", 4000)
    log = Log(tmp_path / "console.log")
    for number in range(1000):
        log.add(b"line %d\n" % number)
    log.add(b"x" * 100_000)
    text = log.file.read_text()
    assert len(text) < 4500
    assert text.startswith("[")
    assert " earlier bytes were dropped]" in text
    assert "line 999" in text
    assert all(len(line) <= console.LONGEST + 11 for line in text.splitlines())

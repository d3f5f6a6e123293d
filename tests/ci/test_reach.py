"""A board that does not answer is reported within seconds, with advice, before any long work."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from axrun.errors import BadInput, CheckFailed
from ci.device import place, power, reach
from ci.device.place import Address, Board

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("LG_BOARD_POWER", raising=False)
    return place.find("ax650")


def at(port: int, host: str = "127.0.0.1") -> Address:
    return Address(host, port, "axera", Path("key"))


@contextlib.contextmanager
def listener(greeting: bytes | None) -> Iterator[int]:
    """A port whose connections are given a greeting; None: they are never taken, as by a board that hangs."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    link, _ = server.accept()
                    link.sendall(greeting or b"")
                    link.close()

        if greeting is not None:
            threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]


def refused(board: Board, where: Address, patience: float = 5.0) -> str:
    with pytest.raises(BadInput) as caught:
        reach.require(board, where, patience=patience)
    assert len(str(caught.value).splitlines()) == 2
    return str(caught.value)


def test_a_board_that_greets(board: Board) -> None:
    said: list[str] = []
    with listener(b"SSH-2.0-OpenSSH_9\r\n") as port:
        reach.require(board, at(port), said.append)
    assert said[0] == f"ax650: is it on? axera@127.0.0.1 port {port} ..."
    assert said[1].startswith("ax650 answers (")


def test_why_a_board_does_not_answer(board: Board) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nothing = probe.getsockname()[1]
    assert "port 1: Connection refused\nSwitch it on: " in refused(board, at(1))
    assert f"port {nothing}: Connection refused" in refused(board, at(nothing))
    with listener(b"HTTP/1.1 400\r\n") as port:
        assert "the port is open, but not an SSH server" in refused(board, at(port))
    with listener(b"SS") as port:
        assert "the port is open, but not an SSH server" in refused(board, at(port))
    started = time.monotonic()
    with listener(None) as port:
        assert ": no answer in 0 s\n" in refused(board, at(port), 0.3)
    assert time.monotonic() - started < 5
    text = refused(board, at(22, "no-such-board.invalid"))
    assert 'its name does not resolve\nSet its address: address = "192.168.1.50" in ' in text


@pytest.mark.parametrize("hand", ["manual", "none"])
def test_a_board_that_nobody_but_its_user_switches(board: Board, hand: str) -> None:
    by_hand = dataclasses.replace(board, power=hand)
    assert f"Switch it on by hand (power is {hand!r})," in refused(by_hand, at(1))


def test_the_command_that_is_named_works_when_pasted(tmp_path: Path) -> None:
    """From the checkout, from a folder of it and from elsewhere, without invoke on the PATH."""
    code = "from ci.device import commands; print(commands.invoke('board.up', '--board', 'no such'))"
    for folder in (ROOT, ROOT / "ci" / "boards", tmp_path):
        kept = {**os.environ, "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
        told = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env=kept, capture_output=True, text=True, check=True
        ).stdout
        done = subprocess.run(["sh", "-c", told], cwd=folder, env=kept, capture_output=True, text=True)
        assert done.stderr.startswith("error: no board is named 'no such'"), (folder, told, done)


def test_deploy_looks_before_it_builds_a_package(tmp_path: Path, bundle_s8: Path) -> None:
    from ci.device import deploy

    board = dataclasses.replace(place.find("virtual"), state=tmp_path)
    made: list[int] = []

    def package() -> object:
        made.append(1)
        raise AssertionError

    with pytest.raises(BadInput, match=r"virtual does not answer .*\nSwitch it on: .*board\.up --board virtual"):
        deploy.deploy(board, at(1), package, bundle_s8, "1+1=")  # type: ignore[arg-type]
    assert not made


def test_a_night_reports_a_board_without_power_port(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    none, manual = (dataclasses.replace(board, power=hand) for hand in ("none", "manual"))
    assert list(power.unable(board)) == []
    (text,) = power.unable(none)
    assert text == ("power: none: ax650 is not power-cycled: no cold start is tested, and it stays on after the night")
    (text,) = power.unable(manual)
    assert text.startswith("power: manual, but no terminal to ask the user: ax650 is not power-cycled")


def test_a_user_is_asked_once_and_the_board_awaited(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    manual, said = dataclasses.replace(board, power="manual"), list[str]()
    read, write = os.pipe()
    os.write(write, b"\n")
    with os.fdopen(read) as stdin, listener(b"SSH-2.0-x\r\n") as port:
        monkeypatch.setattr("sys.stdin", stdin)
        monkeypatch.setattr(place, "address", lambda board: at(port))
        done = power.by_hand(manual, said.append, 5.0, ask=True)
        assert said == ["switch ax650 off and on again, now; then press Enter"]
        assert done.startswith("ax650 was switched off and on by its user, as they say")
        with pytest.raises(BadInput, match="SIGTERM ended the night"):
            power.by_hand(manual, said.append, 5.0, stop=lambda: "SIGTERM ended the night", ask=True)
        os.write(write, b"\n")
        monkeypatch.setattr(place, "address", lambda board: at(1))
        with pytest.raises(CheckFailed, match="ax650 was switched by hand and does not answer: no sshd"):
            power.by_hand(manual, said.append, 0.1, ask=True)
    os.close(write)

"""A farm of one emulated board: labgrid's own coordinator and exporter, on loopback."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from axrun.errors import BadInput
from ci.device import holding, place
from ci.device.connection import Connection
from ci.device.place import Board
from tests.deploy.conftest import Place

pytestmark = pytest.mark.system
TOOLS = Path(sys.executable).parent


@pytest.fixture
def farm(virtual: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Board]:
    """A place tagged board=virtual, and the board as a member of the farm."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("LG_COORDINATOR", coordinator)
    exported = tmp_path / "exported.yaml"
    service = f"address: {virtual.at.host}, port: {virtual.at.port}, username: {virtual.at.user}"
    exported.write_text(f"shelf:\n  NetworkService: {{{service}}}\n")
    log = (tmp_path / "farm.log").open("wb")
    running = [
        subprocess.Popen([TOOLS / "labgrid-coordinator", "-l", coordinator], cwd=tmp_path, stdout=log, stderr=log)
    ]
    try:
        wait_for("resources")
        exporter = [str(TOOLS / "labgrid-exporter"), "-c", coordinator, "-n", "shed"]
        exporter += ["--hostname", "localhost", str(exported)]
        running.append(subprocess.Popen(exporter, cwd=tmp_path, stdout=log, stderr=log))
        wait_for("resources", "shed/shelf/NetworkService")
        client("-p", "shelf-1", "create")
        client("-p", "shelf-1", "add-match", "shed/shelf/NetworkService")
        client("-p", "shelf-1", "set-tags", "board=virtual")
        yaml = tmp_path / "virtual-farm.yaml"
        text = (place.BOARDS / "ax650-farm.yaml").read_text().replace("ax650", "virtual")
        text = text.replace('"3.10"', '"3.11"')
        yaml.write_text(text.replace("      NetworkPowerDriver: {}\n", ""))
        yield dataclasses.replace(place.find(str(yaml)), state=virtual.board.state)
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait(timeout=60)
        log.close()


def client(*words: str) -> str:
    done = subprocess.run([TOOLS / "labgrid-client", *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_for(word: str, text: str = "") -> None:
    """Waits until the coordinator answers with `text`."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        done = subprocess.run([TOOLS / "labgrid-client", word], capture_output=True, text=True, timeout=60)
        if done.returncode == 0 and text in done.stdout:
            return
        time.sleep(0.2)
    raise AssertionError(f"labgrid-client {word} does not say {text!r}: {done.stderr}")


def test_a_place_is_reserved_used_and_released(farm: Board, virtual: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "CLIENT_SECONDS", 100)
    with place.hold(farm):
        assert "acquired: " in client("-p", "shelf-1", "show")
        at = place.address(farm)
        assert (at.host, at.port, at.user) == (virtual.at.host, virtual.at.port, virtual.at.user)
        with Connection(farm, at) as link:
            assert link.call("facts")["architecture"] == "aarch64"
        monkeypatch.setattr(place, "CLIENT_SECONDS", 3)
        with pytest.raises(BadInput, match="no virtual became free in 3 s"), place.hold(farm):
            pass
        monkeypatch.setattr(place, "CLIENT_SECONDS", 100)
    assert "acquired: None" in client("-p", "shelf-1", "show")
    assert "LG_TOKEN" not in os.environ
    with place.hold(farm):
        pass


def test_the_place_is_released_if_the_deploy_fails(farm: Board) -> None:
    with pytest.raises(ZeroDivisionError), place.hold(farm):
        raise ZeroDivisionError
    assert "acquired: None" in client("-p", "shelf-1", "show")
    assert "Reservation" not in client("reservations")


def test_board_free_releases_the_place_of_a_killed_process(farm: Board) -> None:
    code = """if True:
        import os, signal, sys
        from ci.device import holding, place
        with holding.hold(place.find(sys.argv[1]), "nightly", 100):
            os.kill(os.getpid(), signal.SIGKILL)
    """
    environment = {**os.environ, "LG_BOARD_STATE": str(farm.state)}
    done = subprocess.run([sys.executable, "-c", code, str(farm.yaml)], cwd=place.ROOT, env=environment, timeout=600)
    assert done.returncode == -signal.SIGKILL
    assert "acquired: None" not in client("-p", "shelf-1", "show")
    first, *lines = holding.free(farm)
    assert first.startswith("held by nightly (pid ")
    assert [line.partition(" of reservation ")[0] for line in lines[:2]] == ["  the place", "  the reservation"]
    assert all(line.endswith(": released") for line in lines[:2])
    assert "acquired: None" in client("-p", "shelf-1", "show")
    assert "Reservation" not in client("reservations")
    assert list(holding.free(farm)) == ["nothing of virtual was held"]


def test_an_unreachable_coordinator(farm: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LG_COORDINATOR", "127.0.0.1:1")
    with pytest.raises(BadInput, match="labgrid-client reserve"), place.hold(farm):
        pass

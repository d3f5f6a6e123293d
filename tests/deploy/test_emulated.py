"""The user's commands on the emulated arm64 board."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ci.device import place, virtual_board
from tests import shared
from tests.deploy.conftest import ROOT, Place

pytestmark = pytest.mark.system
Invoke = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def invoke(virtual: Place, bundles: tuple[Path, Path], tmp_path: Path) -> Invoke:
    """Runs a task on the emulated board, with the bundle at the output path of `make build`."""
    shutil.copytree(bundles[0], tmp_path / "out" / "tiny-qwen2")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "invoke", *words],
            cwd=ROOT,
            env={**os.environ, **virtual.board.variables(), "OUT": str(tmp_path / "out")},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=600,
        )

    return run


def test_deploy_ask_and_rollback(invoke: Invoke, virtual: Place, tmp_path: Path) -> None:
    shared.copy_board_package(virtual.board.python, tmp_path / "out")
    first = invoke("deploy", "--board", "virtual")
    assert first.returncode == 0, first.stderr
    lines = [line for line in first.stdout.splitlines() if not line.startswith("setup:")]
    assert lines[0].startswith("virtual (emulated): is it on? ")
    assert lines[1].startswith("virtual answers (")
    assert lines[2].startswith("virtual: aarch64, Python 3.11.")
    assert "answers '1+1=' with '2' (" in lines[-2]
    current = (virtual.root / "current").resolve()
    assert lines[-1] == f"current is {current.name}, the first"

    with place.target(virtual.board) as target:
        ssh = target.get_driver("SSHDriver")
        said, _, code = ssh.run("sh axrun/current/axrun run axrun/current/model --prompt 12+30= --greedy --verify")
        assert (code, said) == (0, ["42"])

    again = invoke("deploy", "--board", "virtual", "--prompt", "2+2=")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count(": already there, verified") == 2
    assert (virtual.root / "current").resolve() != current
    back = invoke("rollback", "--board", "virtual")
    assert back.returncode == 0, back.stderr
    assert (virtual.root / "current").resolve() == current


def test_a_power_cut_keeps_the_disk(virtual: Place) -> None:
    mark = virtual.root / "mark"
    mark.write_text("here\n")
    with place.power(virtual.board) as power:
        power.off()
        assert virtual_board.running(virtual.board) is None
        power.off()
        power.on()
        power.cycle()
    with place.target(virtual.board) as target:
        assert target.get_driver("SSHDriver").run_check("cat axrun/mark; uname -m") == ["here", "aarch64"]
    mark.unlink()


def test_a_power_cut_ends_every_process(virtual: Place) -> None:
    sleeps = f"sleep 4321.{os.getpid()}"  # unique to this test run
    with place.target(virtual.board) as target:
        target.get_driver("SSHDriver").run_check(f"setsid {sleeps} </dev/null >/dev/null 2>&1 & exit")
    listed = ["ps", "ax", "-o", "args"]
    assert sleeps in subprocess.run(listed, capture_output=True, text=True, check=True).stdout
    virtual_board.down(virtual.board)
    try:
        assert sleeps not in subprocess.run(listed, capture_output=True, text=True, check=True).stdout
    finally:
        virtual_board.up(virtual.board, virtual.at)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["deploy", "--board", "ax65"], "error: no board is named 'ax65': ci/boards/ has ax630c, ax630c-farm, ax650"),
        (["deploy", "--board", "virtual", "--model", "qwen2-0.5b"], "error: there is no bundle "),
        (["board.up", "--board", "ax650", "--fresh"], "error: ax650 is a real board"),
        (["rollback", "--board", "ax650-farm"], "error: ax650 is in a farm: set its coordinator, LG_COORDINATOR="),
    ],
)
def test_an_impossible_command_is_a_one_line_error(invoke: Invoke, words: list[str], said: str) -> None:
    done = invoke(*words)
    assert done.returncode == 2
    assert done.stderr.startswith(said)
    assert "Traceback" not in done.stderr


def test_two_users_of_one_board(invoke: Invoke, virtual: Place) -> None:
    with place.hold(virtual.board):
        done = invoke("rollback", "--board", "virtual")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: virtual is held by {place.owner()}")

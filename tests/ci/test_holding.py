"""A killed holder leaves a note, and the next command cleans up what it names, and nothing else."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from invoke.exceptions import Exit

from axrun.errors import BadInput
from ci.device import board_status, holding, place
from ci.device.holding import MARK, Note
from ci.device.place import Board
from ci.tasks import boards
from tests.ci.test_stage import DAEMON, WAIT, alive

ROOT = Path(__file__).resolve().parents[2]
RELAY = """
targets:
  main:
    resources:
      NetworkService: {{address: 127.0.65.254, port: 2222, username: board}}
    drivers:
      SSHDriver: {{keyfile: key}}
      ExternalPowerDriver:
        cmd_on: "{python} -c 'open(\\"{folder}/relay\\", \\"a\\").write(\\"on \\")'"
        cmd_off: "{python} -c 'open(\\"{folder}/relay\\", \\"a\\").write(\\"off \\")'"
        delay: 0.0
options: {{board: relay, architecture: aarch64, python: "3.11", root: axrun, engine: ax}}
"""
# Holds the board, switches it on, leaves a daemon in a session of its own, and is killed.
HOLDER = """
import os, signal, subprocess, sys
from ci.device import board_status, holding, place
with holding.hold(place.find(sys.argv[1]), "nightly of tiny-qwen2") as held:
    held.stage("power on", power=True)
    held.stage("build")
    open(held.note.temporary + "/half a wheel", "w").close()
    environment = {**os.environ, **held.variables()}
    subprocess.run([sys.executable, "-c", sys.argv[2], sys.argv[3]], env=environment, check=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    """A board with a relay that records its commands."""
    monkeypatch.setenv("LG_BOARD_STATE", str(tmp_path / "state"))
    monkeypatch.delenv(place.HELD, raising=False)
    yaml = tmp_path / "relay.yaml"
    yaml.write_text(RELAY.format(python=sys.executable, folder=tmp_path))
    return place.find(str(yaml))


@pytest.fixture
def killed(board: Board, tmp_path: Path) -> Iterator[int]:
    """A night that was killed; the pid of the daemon that it left."""
    done = subprocess.run(
        [sys.executable, "-c", HOLDER, str(board.yaml), DAEMON, str(tmp_path / "pid")], cwd=ROOT, timeout=WAIT
    )
    assert done.returncode == -signal.SIGKILL
    pid = int((tmp_path / "pid").read_text())
    assert alive(pid)
    yield pid
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def relay(board: Board) -> list[str]:
    file = board.yaml.parent / "relay"
    return file.read_text().split() if file.exists() else []


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_board_free_clears_everything_and_says_so(board: Board, killed: int) -> None:
    (note,) = holding.read(board)
    assert not holding.alive(board, note)
    assert Path(note.temporary, "half a wheel").exists()
    lines = list(holding.free(board))
    assert (
        lines[0] == f"held by nightly of tiny-qwen2 (pid {note.pid}, since {note.since}, in build), which was killed:"
    )
    assert any(line.startswith(f"  process {killed} (") and line.endswith("): ended") for line in lines)
    assert "  the power of relay: switched off" in lines
    assert f"  temporary files in {note.temporary}: removed" in lines
    assert not alive(killed)
    assert not Path(note.temporary).exists()
    assert relay(board) == ["off"]
    assert list(holding.free(board)) == ["nothing of relay was held"]


def test_the_next_holder_clears_it_and_leaves_the_power(board: Board, killed: int) -> None:
    said: list[str] = []
    with holding.hold(board, "deploy of tiny-qwen2", say=said.append) as held:
        assert held
        assert said[0].startswith("nightly of tiny-qwen2 (pid ")
        assert said[0].endswith(" was killed; clearing what it left")
        assert "  the power of relay stays as it is" in said
        assert not alive(killed)
        assert relay(board) == []
        assert [note.mark for note in holding.read(board)] == [held.note.mark]
    assert holding.read(board) == []
    assert not Path(held.note.temporary).exists()


def test_a_holder_that_is_alive_is_left_alone(board: Board) -> None:
    with holding.hold(board, "nightly of tiny-qwen2") as held:
        assert held
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1, env={**os.environ, **held.variables()})
        with pytest.raises(BadInput, match="which is running: nothing was changed\nWait for it, or end it: kill "):
            list(holding.free(board))
        assert list(holding.clear(board)) == []
        assert child.poll() is None
        child.kill()
        child.wait()


def test_a_number_that_another_process_has_by_now_is_not_killed(board: Board) -> None:
    """Of a note, nothing but the mark says which processes are meant."""
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1)
    nearly = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1, env={**os.environ, MARK: uuid.uuid4().hex})
    for note in (
        Note("nightly", "then", pid=other.pid),  # its number was given to another process
        Note("nightly", "then", pid=os.getpid()),  # this machine was rebooted
    ):
        file = board.state / "held" / f"{note.mark}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(dataclasses.asdict(note)))
        assert list(holding.free(board)) == [f"held by {note.title}, which was killed:"]
    for process in (other, nearly):
        assert process.poll() is None
        process.kill()
        process.wait()


def test_an_invalid_note_is_ignored(board: Board, tmp_path: Path) -> None:
    """What lies there is not trusted: no path of anybody's is removed for it."""
    precious = tmp_path / "precious"
    precious.mkdir()
    folder = board.state / "held"
    folder.mkdir(parents=True)
    note = Note("nightly", "then", temporary=str(precious), worktrees=[str(precious)])
    (folder / f"{note.mark}.json").write_text(json.dumps(dataclasses.asdict(note)))
    for name, text in (("torn.json", '{"what"'), ("a.json", "[]"), ("b.json", '{"what": "x"}')):
        (folder / name).write_text(text)
    assert list(holding.free(board)) == [f"held by {note.title}, which was killed:"]
    assert precious.is_dir()
    assert list(folder.iterdir()) == []


def test_a_checkout_of_a_bisection_is_removed(board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "repository"
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    for words in (["init", "--quiet", "."], [*who, "commit", "--quiet", "--allow-empty", "-m", "first"]):
        repository.mkdir(exist_ok=True)
        subprocess.run(["git", *words], cwd=repository, check=True)
    monkeypatch.setattr(place, "ROOT", repository)
    tree = tmp_path / "checkout"
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree)], cwd=repository, check=True)
    note = Note("bisection of tiny-qwen2", "then", worktrees=[str(tree)])
    (board.state / "held").mkdir(parents=True)
    (board.state / "held" / f"{note.mark}.json").write_text(json.dumps(dataclasses.asdict(note)))
    assert list(holding.free(board))[1:] == [f"  checkout {tree}: removed"]
    assert not tree.exists()


def test_within_a_hold_nothing_is_noted(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(place.HELD, str(board.state))
    with holding.hold(board, "deploy") as held, holding.marked(held):
        assert held is None
        assert MARK not in os.environ
    assert not (board.state / "held").exists()


def test_waiting_names_the_holder(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "TELL_SECONDS", 0.5)
    code = """
        import sys
        from ci.device import place
        with place.hold(place.find(sys.argv[1])):
            print(place.owner(), flush=True)
            sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(board.yaml)]
    with subprocess.Popen(command, cwd=ROOT, stdin=-1, stdout=-1, text=True) as other:
        assert other.stdin
        assert other.stdout
        owner = other.stdout.readline().strip()
        said: list[str] = []

        def say(line: str) -> None:
            said.append(line)
            if len(said) == 2:
                assert other.stdin
                other.stdin.close()

        with holding.hold(board, "nightly", 300, say):
            pass
    assert said[0] == f"relay is held by {owner}; waited 0 s of at most 300 s"
    assert said[1].startswith(f"relay is held by {owner}; waited ")


def test_a_command_that_changes_a_held_board_is_refused_or_forced(
    board: Board, capsys: pytest.CaptureFixture[str]
) -> None:
    yaml = str(board.yaml)
    calls: list[Callable[[], object]] = [
        lambda: boards.board_down.body(None, board=yaml),
        lambda: boards.board_up.body(None, board=yaml),
        lambda: boards.board_shell.body(None, board=yaml, command="true"),
        lambda: boards.board_doctor.body(None, board=yaml),
        lambda: boards.board_ask.body(None, "1+1=", board=yaml),
        lambda: boards.board_serve.body(None, board=yaml),
        lambda: boards.rollback.body(None, board=yaml),
    ]
    with holding.hold(board, "nightly of tiny-qwen2") as held:
        assert held
        held.stage("measure")
        assert board_status.holder(board) == held.note.title
        assert held.note.title.endswith(", in measure)")
        for call in calls:
            with pytest.raises(Exit) as refused:
                call()
            assert refused.value.code == 2
            assert str(refused.value).startswith(f"error: relay is held by {held.note.title}")
        assert relay(board) == []
        boards.board_down.body(None, board=yaml, even_if_held=True)
        assert f"note: relay is held by {held.note.title}, whose run may fail now\n" in capsys.readouterr().out
        assert relay(board) == ["off"]
    boards.board_down.body(None, board=yaml)
    assert relay(board) == ["off", "off"]


def test_status_shows_leftovers_of_a_killed_holder(board: Board, killed: int) -> None:
    (note,) = holding.read(board)
    found = board_status.status(board, place.Address("127.0.65.254", 2222, "board", board.state / "key"))
    assert found["left"] == [note.title]
    assert f"{note.title}, which was killed: " in "\n".join(board_status.lines(found))

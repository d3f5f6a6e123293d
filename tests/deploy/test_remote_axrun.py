"""axrun on a board, controlled from here: streamed answers, a forwarded server, and nothing left behind."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from axrun.errors import BadInput
from ci.device import board_shell, board_status, remote_axrun
from ci.device.deploy import deploy
from ci.device.place import Address
from tests.deploy.conftest import ROOT, Place, host_package, loopback

pytestmark = pytest.mark.system

SERVE = """
import json, sys
from pathlib import Path
from ci.device import remote_axrun
from ci.device.place import Address, Board
given = json.loads(sys.argv[1])
board = Board("host", *map(Path, given["paths"]), *given["rest"])
with remote_axrun.served(board, Address(*given["at"][:3], Path(given["at"][3])), 0, print) as (url, far):
    print(url, flush=True)
    far.wait()
"""


@pytest.fixture
def deployed(host: Place, bundles: tuple[Path, Path], tmp_path: Path) -> Place:
    deploy(host.board, host.at, host_package(tmp_path / "package"), bundles[0], "1+1=")
    return host


def ask(place: Place, prompt: str, *words: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    return remote_axrun.ask(place.board, place.at, prompt, out, err, words), out.getvalue(), err.getvalue()


def left(place: Place) -> list[str]:
    """Local processes that use the board, and the processes on the board."""
    listed = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    marks = (str(place.board.root), str(place.board.state / "known_hosts"))
    return [line for line in listed.splitlines() if any(mark in line for mark in marks)]


def gone(place: Place) -> bool:
    deadline = time.monotonic() + 60
    while left(place) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not left(place)


def test_a_prompt_reaches_the_model_as_typed(deployed: Place, tmp_path: Path) -> None:
    code, out, err = ask(deployed, "12+30=", "--greedy")
    assert (code, out) == (0, "42\n")
    assert "ttft: " in err
    assert " token/s" in err
    mark = tmp_path / "mark"
    code, _, err = ask(deployed, f"$(touch {mark}) `touch {mark}`; touch {mark} ' \" \\ \n-x", "--max-tokens", "1")
    assert code == 0, err
    assert not mark.exists()
    assert ask(deployed, "1+1=", "--no-such-flag")[0] == 2
    assert gone(deployed)


def test_before_the_first_deploy(host: Place) -> None:
    with pytest.raises(BadInput, match=r"host has no release\nFirst: .*deploy --board"):
        ask(host, "1+1=")


def test_a_server_ends_with_its_context_manager(deployed: Place) -> None:
    said: list[str] = []
    with remote_axrun.served(deployed.board, deployed.at, 0, said.append) as (url, far):
        with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as answer:
            assert json.load(answer)["data"][0]["id"] == "qwen2"
        assert far.process.poll() is None
        assert left(deployed)
    assert gone(deployed)
    assert any("LLM init ok" in line for line in said)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_server_ends_with_its_parent_process(deployed: Place, number: int) -> None:
    board, at = deployed.board, deployed.at
    given = {
        "paths": [str(board.yaml), str(board.state)],
        "rest": [board.architecture, board.python, board.root, board.engine],
        "at": [at.host, at.port, at.user, str(at.keyfile)],
    }
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, json.dumps(given)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout
    url = next(line for line in process.stdout if line.startswith("http")).strip()
    with urllib.request.urlopen(f"{url}/health", timeout=30) as answer:
        assert answer.status == 200
    process.send_signal(number)
    process.wait(60)
    assert gone(deployed)


def test_a_shell_returns_its_exit_code(host: Place, capfd: pytest.CaptureFixture[str]) -> None:
    assert board_shell.shell(host.board, host.at, "echo $((40 + 2)); exit 7") == 7
    assert capfd.readouterr().out == "42\n"


def test_status_of_a_board_with_a_release(deployed: Place) -> None:
    seen = board_status.status(deployed.board, deployed.at)
    assert seen["answers"] == ""
    text = "\n".join(board_status.lines(json.loads(json.dumps(seen))))
    assert text.startswith("host: answers\n")
    assert f"  user        {deployed.at.user}@" in text
    assert "  model       qwen2, asked '1+1=' when deployed" in text
    off = board_status.status(deployed.board, Address(loopback(), 1, "x", Path("key")))
    assert off["answers"] == "Connection refused"

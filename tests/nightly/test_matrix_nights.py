"""Nights of a matrix on emulated boards: one build for two boards, and a green run with its page."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ci.device import place, virtual_board
from ci.device.place import Board
from ci.nightly import history
from tests import shared
from tests.nightly.conftest import MARK, ROOT, VIRTUAL, Desk, Night, loopback

pytestmark = pytest.mark.system


def start(desk: Desk, file: Path, *flags: str, variables: dict[str, str] | None = None) -> Night:
    mark = uuid.uuid4().hex
    kept = desk.folder / f"history of {file.stem}"
    where = ["--matrix", str(file), "--out", str(desk.folder / "out"), "--history", str(kept)]
    process = subprocess.Popen(
        [sys.executable, "-m", "invoke", "nightly", *where, *flags],
        cwd=ROOT,
        env={**(desk.variables() if variables is None else variables), MARK: mark},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    return Night(process, mark)


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Board]]:
    """Two private emulated boards at different addresses."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    boards = []
    for number, address in ((2, loopback()), (3, loopback().replace("127.130", "127.131"))):
        file = tmp_path / f"v{number}.yaml"
        text = VIRTUAL.read_text().replace("$BASE/../..", str(ROOT)).replace("--board virtual", f"--board {file}")
        text = text.replace("board: virtual", f"board: virtual-{number}").replace("127.0.65.1", address)
        file.write_text(text)
        boards.append(place.find(str(file)))
    yield boards
    for board in boards:
        virtual_board.down(board)


def test_two_boards_share_a_build(two: list[Board], desk: Desk, tmp_path: Path) -> None:
    """Each is switched on at its own address, gets the bundle, and is released after its probe times out."""
    for board in two:
        shared.copy_board_package(board.python, desk.folder / "out" / "nightly" / board.name)
    file = tmp_path / "two.toml"
    file.write_text(f'boards = {json.dumps([board.yaml.name for board in two])}\nmodels = ["tiny-qwen2"]\n')
    kept = {key: value for key, value in os.environ.items() if not key.startswith("LG_")}
    night = start(desk, file, "--limit", "probe=0.2", variables=kept)
    code, said = night.end()
    why = "probe: probe did not end within 0 s"
    assert said[0].startswith(f"red: 2 of 2 nights on 2 boards: tiny-qwen2 on virtual-2 (emulated): {why}")
    assert code == 1
    console = "\n".join(night.said)
    assert console.count("build done after") == 3  # the build, and both nights that use it
    for board in two:
        assert f"[{board.name} tiny-qwen2] power on done after" in console
        assert desk_of(board).left(night) == []


def desk_of(board: Board) -> Desk:
    return Desk(board, board.state)


def test_a_matrix_is_green(desk: Desk) -> None:
    file = desk.folder / "one.toml"
    file.write_text('boards = ["virtual"]\nmodels = ["tiny-qwen2"]\n')
    night = start(desk, file)
    code, said = night.end()
    assert said[:2] == [
        "green: 1 night on 1 board: 1 within their gates",
        "  ✓ tiny-qwen2 on virtual (emulated): green",
    ]
    assert code == 0
    assert desk.left(night) == []
    (held,) = history.read(desk.folder / "history of one", "virtual", "tiny-qwen2").nights
    assert (held.verdict, held.reason, held.handed_in) == ("green", "", False)
    assert "layer 0 prefill" in held.layers  # of the shared build's check
    folder = Path(said[-1].removeprefix("  page: ")).parent
    (case,) = ElementTree.parse(folder / "junit.xml").iter("testcase")
    assert not case.findall("failure")
    assert "mean KL divergence from the checkpoint" in (folder / "matrix.html").read_text()
    site = desk.folder / "history of one" / "site"
    assert "green: the last night of tiny-qwen2 on virtual" in (site / "index.html").read_text()
    assert (
        dataclasses.asdict(held)["figures"]
        == json.loads((site / "nights.json").read_text())["boards"][0]["nights"][0]["figures"]
    )

"""A long command is reported while it runs, and killed on a timeout."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from axrun.errors import BadInput
from ci.device import place, virtual_board
from ci.device.progress import watched

TALKS = "import sys, time; print('first', flush=True); print('I: extracting\\x1b[31m', file=sys.stderr, flush=True)"


def test_it_says_how_long_and_the_last_line(tmp_path: Path) -> None:
    said: list[str] = []
    go = tmp_path / "go"
    code = f"{TALKS}\nimport os\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)\nsys.exit(3)"

    def say(line: str) -> None:
        said.append(line)
        if "extracting" in line:
            go.touch()

    done = watched([sys.executable, "-c", code], "mmdebstrap", say, seconds=60, every=0.05)
    assert done.returncode == 3
    assert done.stdout == "first\nI: extracting\x1b[31m\n"
    assert said[-1].startswith("mmdebstrap: ")
    assert said[-1].endswith(" s, I: extracting?[31m")


def test_it_is_ended_when_it_takes_too_long() -> None:
    started = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        watched(["sleep", "1000"], "sleep", lambda line: None, seconds=0.2)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(("given", "flag"), [({"fresh": True}, "--fresh"), ({"disk": "64M"}, "--disk")])
def test_a_disk_is_refused_for_an_emulated_board_that_is_on(
    given: dict[str, object], flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = place.find("virtual")
    monkeypatch.setattr(virtual_board, "running", lambda board: virtual_board.Running(1, 1))
    with pytest.raises(BadInput, match=rf"{flag} is for its next start\nSwitch it off first: .*board\.down"):
        virtual_board.up(board, place.Address("127.0.0.1", 1, "board", tmp_path), **given)  # type: ignore[arg-type]
    said: list[str] = []
    virtual_board.up(board, place.Address("127.0.0.1", 1, "board", tmp_path), say=said.append)
    assert said == ["virtual is on: board@127.0.0.1 port 1"]

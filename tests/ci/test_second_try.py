"""A whole night with a dead relay: both reasons, history and notification; then the same again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ci.device import place
from ci.nightly import history
from tests.ci.test_holding import RELAY

ROOT = Path(__file__).resolve().parents[2]
NIGHT = """
import sys
from pathlib import Path
from ci.nightly.pipeline import Options
from ci.nightly.night import nightly
yaml, folder, command = sys.argv[1:]
options = Options(yaml, "tiny-qwen2", Path(folder, "out"), Path(folder, "history"), notify=command, bisect=True)
held = nightly(options, lambda line: print(line, file=sys.stderr))
print("\\n".join(held.lines()))
raise SystemExit(held.verdict.code)
"""
REASON = "power on: the power of relay could not be switched: no such outlet"


@pytest.fixture
def dead(tmp_path: Path) -> Path:
    """A board whose relay refuses to switch it on."""
    text = RELAY.format(python=sys.executable, folder=tmp_path).splitlines()
    refuse = """        cmd_on: "sh -c 'echo no such outlet; exit 1'\""""
    yaml = tmp_path / "relay.yaml"
    yaml.write_text("\n".join(refuse if "cmd_on" in line else line for line in text))
    return yaml


def hold(yaml: Path, command: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("LG_PLACE", place.HELD)}
    return subprocess.run(
        [sys.executable, "-c", NIGHT, str(yaml), str(yaml.parent), command],
        cwd=ROOT,
        env={**kept, "LG_BOARD_STATE": str(yaml.parent / "state")},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_two_failures_give_one_red_night_with_both_reasons(dead: Path) -> None:
    notes = dead.parent / "notes"
    code = "import os, sys; print(os.environ['NIGHT_CHANGE'], sys.stdin.readline(), file=open(sys.argv[1], 'a'))"
    command = f'{sys.executable} -c "{code}" {notes}'
    done = hold(dead, command)
    said = done.stdout.splitlines()
    assert said[0] == f"red: tiny-qwen2 on relay: {REASON} (on the second try; the first: {REASON})", done.stderr
    assert done.returncode == 1
    assert f"retrying power on after a power cycle: {REASON.partition(': ')[2]}" in done.stderr.splitlines()
    assert "  relay needed a second try in 1 of its last 1 nights" in said
    assert "  not bisected: no commit made power on fail: the board or this machine failed" in said
    (held,) = history.read(dead.parent / "history", "relay", "tiny-qwen2").nights
    assert (held.flaky, held.culprit, held.stage) == (REASON, "", "power on")
    assert notes.read_text().split("\n")[0] == f"the first night is red {said[0]}"
    assert (dead.parent / "relay").read_text().split() == ["off", "off", "off"]  # before each try, and at the end
    assert not list((dead.parent / "state" / "held").iterdir())

    before = notes.read_text()
    assert hold(dead, command).returncode == 1
    assert notes.read_text() == before

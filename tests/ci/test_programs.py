"""Programs sent to a board: complete, in import order, with clear errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ci.device import programs


def answered(program: str, requests: list[dict[str, object]], python: str = sys.executable) -> list[object]:
    """A program's answers, run as a board runs it, in an empty folder."""
    command = programs.command("no-such-folder").replace("exec python3", f"exec {python}")
    given = programs.sent(program) + b"".join(json.dumps(request).encode() + b"\n" for request in requests)
    done = subprocess.run(["sh", "-c", command], input=given, capture_output=True, cwd="/", check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_module_is_sent_behind_those_it_imports() -> None:
    mains = (programs.RELEASES, programs.STATE, programs.SERVER, programs.ATTEND)
    sent = {name: programs.needed(name) for name in mains}
    assert {module for names in sent.values() for module in names} == {
        path.stem for path in programs.FOLDER.glob("*.py")
    }
    assert sent[programs.ATTEND] == ["attend"]
    state = sent[programs.STATE]
    assert state.index("requests") < state.index("releases") < state.index("state") == len(state) - 1


def test_requests_are_answered_and_refusals_have_a_kind() -> None:
    asked: list[dict[str, object]] = [{"do": "facts"}, {"do": "survey", "store": "x", "name": "y", "listing": []}]
    ready, facts, refused = answered(programs.RELEASES, asked)
    assert ready == {"ok": "ready"}
    assert isinstance(facts, dict)
    assert facts["ok"]["current"] is None
    assert refused == {"error": "bad", "text": "no store 'x'"}


def test_status_and_readings_are_of_one_program() -> None:
    _, facts, status, readings = answered(programs.STATE, [{"do": what} for what in ("facts", "status", "readings")])
    assert isinstance(status, dict)
    assert isinstance(readings, dict)
    assert isinstance(facts, dict)
    degrees = readings["ok"]["degrees"]
    assert [name for name, _ in status["ok"]["temperatures"]] == list(degrees)
    assert status["ok"]["releases"] == []


def test_a_python_that_is_too_old_says_which_it_is(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text(
        f'#!/bin/sh\nexec {sys.executable} -I -S -c "import sys; sys.version_info = (3, 8)\n$5" folder < /dev/null\n'
    )
    old.chmod(0o755)
    assert answered(programs.RELEASES, [], str(old)) == [{"error": "old", "text": "3.8"}]


@pytest.mark.parametrize("program", [programs.RELEASES, programs.STATE, programs.SERVER])
def test_a_program_ends_with_its_input(program: str) -> None:
    assert answered(program, []) == [{"ok": "ready"}]

"""Output of a command is bounded while it is read; background processes are not waited for."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from axrun.errors import CheckFailed
from ci.device import bounded, place
from ci.device.evidence import Record
from ci.nightly import notify
from tests.hil.on_board import OnBoard

FLOOD = "head -c 60000000 /dev/zero"
ROOT = Path(__file__).resolve().parents[2]


def test_streams_and_the_code_are_the_commands() -> None:
    done = bounded.run(["sh", "-c", "cat; echo bad >&2; exit 7"], seconds=60, most=100)
    assert (done.code, done.stdout, done.stderr, done.flooded) == (7, b"", b"bad\n", False)
    done = bounded.run(["printf", "%s", "x" * 100], seconds=60, most=100)
    assert (done.code, done.stdout, done.flooded) == (0, b"x" * 100, False)


def test_a_flood_costs_no_memory_and_is_ended() -> None:
    code = (
        "import resource, sys; from ci.device import bounded\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"done = bounded.run(['sh', '-c', '{FLOOD}'], seconds=120, most=1 << 20, drains=sys.argv[1] == 'drains')\n"
        "print(done.code, done.flooded, len(done.stdout), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    for how, expected in (("ends", ["None", "True"]), ("drains", ["0", "False"])):
        said = subprocess.run([sys.executable, "-c", code, how], cwd=ROOT, capture_output=True, text=True, timeout=300)
        *seen, length, grown = said.stdout.split()
        assert seen == expected, said.stderr
        assert int(length) <= 1 << 20
        assert int(grown) < 16 << 10  # KB


def test_background_processes_are_not_waited_for() -> None:
    started = time.monotonic()
    assert notify.send(["sh", "-c", "sleep 300 & exit 0"], "text", {}) == ""
    assert notify.send(["sh", "-c", "yes & exit 0"], "text", {}) == ""  # ended by the pipe that is closed
    assert time.monotonic() - started < 60


def test_endless_output_of_a_board_is_an_error() -> None:
    record = Record("virtual", "0" * 16, "1" * 16, "2" * 16, "", {}, {})
    board = OnBoard(place.find("virtual"), ["sh", "-c"], 120.0, record, "/nonexistent")
    with pytest.raises(CheckFailed) as caught:
        board.run("axrun bench", FLOOD)
    assert str(caught.value).startswith("axrun bench on virtual printed more than 2 MB, starting with b'\\x00")

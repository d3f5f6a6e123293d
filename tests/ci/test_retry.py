"""The retry policy: one retry for failures of network or board, none for failures of the code."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from ci.device import connection, ssh
from ci.nightly import history, retry
from ci.nightly.pipeline import MEASURE
from ci.nightly.stage import INTERRUPTED, TIMED_OUT, Stage
from ci.nightly.verdict import Verdict
from tests.ci.test_history import night

ROOT = Path(__file__).resolve().parents[2]


def failed(name: str, reason: str, code: int = 1) -> Stage:
    return Stage(name, code, 1.0, 10.0, reason, Path("none"))


@pytest.mark.parametrize(
    ("name", "reason", "code"),
    [
        ("power on", "the power of ax650 could not be switched: HTTP 503", 1),
        ("power on", "ax650 was switched on and does not answer: no sshd at 10.0.0.2 port 22 in 180 s\nLook.", 1),
        ("power on", "power on did not end within 240 s; last output: ", TIMED_OUT),
        ("power off", "the power of ax650 could not be switched: HTTP 503", 1),
        ("deploy", "ax650 was lost during verify: client_loop: send disconnect: Broken pipe (exit code 255)", 1),
        ("deploy", "ax650 did not answer facts in 120 s", 1),
        ("deploy", "rsync to ax650: rsync error: timeout in data send/receive (code 30)", 1),
        ("deploy", "axera@10.0.0.2 port 22 cannot be reached: Connection reset by peer\nIs the board on?", 2),
    ],
)
def test_failures_of_network_or_board_are_retried(name: str, reason: str, code: int) -> None:
    assert retry.cause(failed(name, reason, code), [], "ax650") == reason.partition("\n")[0]


@pytest.mark.parametrize(
    ("name", "reason", "code"),
    [
        ("power on", "ax650.yaml has no power port", 2),
        ("power on", "SIGTERM ended the night", INTERRUPTED),
        ("build", "ax650 was lost during a build, said the compiler", 1),
        ("deploy", "ax650 answers '1+1=' with tokens [3], expected [2]", 1),
        ("deploy", "the disk of ax650 has 24 MB free, the package needs 155 MB", 2),
        ("deploy", "release 0 does not run on ax650: ax650 was lost during run", 1),
        ("deploy", "deploy did not end within 1800 s; last output: ", TIMED_OUT),
    ],
)
def test_other_failures_are_not_retried(name: str, reason: str, code: int) -> None:
    assert retry.cause(failed(name, reason, code), [], "ax650") == ""


def test_of_a_measurement_every_failure_must_be_the_boards() -> None:
    hangs, worse = (
        "ax650 hangs: no answer to axrun bench in 40 s",
        "decode behind 128 is 10 token/s, worse than its gate",
    )
    done = failed(MEASURE, "2 failed")
    assert retry.cause(done, [hangs], "ax650") == hangs
    assert retry.cause(done, ["ax650 was started anew during the tests: 1 5, then 1 9"], "ax650")
    assert retry.cause(done, [worse, hangs], "ax650") == ""
    assert retry.cause(done, ["axrun eval on ax650 ended with 1: 'ax650 hangs: no answer to'"], "ax650") == ""
    assert retry.cause(done, ["axrun eval on ax650 did not finish within 40 s"], "ax650") == ""
    assert retry.cause(done, [], "ax650") == ""


def test_every_pattern_matches_a_message_of_the_code() -> None:
    """Each of LOST is found in the source that raises it, so that a reworded message is noticed."""
    sources = inspect.getsource(connection) + inspect.getsource(ssh)
    sources += "".join((ROOT / "tests" / "hil" / name).read_text() for name in ("on_board.py", "conftest.py"))
    said = re.sub(r"\{(self\.)?(board|found)\.name\}|\{at\}", "ax650", sources)
    said = re.sub(r"\{verb\}", "verify", re.sub(r"\{seconds:.0f\}", "40", said))
    for pattern in retry.LOST:
        assert re.search(pattern.replace(r"\S+@\S+ port \d+", "{board}").format(board="ax650"), said), pattern


def test_red_both_times_has_both_reasons() -> None:
    first = "deploy: ax650 did not answer facts in 120 s"
    red = Verdict("deploy: the disk is full", "Make room.", "deploy", 2).after(first)
    assert red.reason == f"deploy: the disk is full (on the second try; the first: {first})"
    assert (red.advice, red.code) == ("Make room.", 2)
    assert Verdict("").after(first) == Verdict("")


def test_the_first_try_makes_room(tmp_path: Path) -> None:
    (tmp_path / "junit.xml").write_text("<first/>")
    retry.set_aside(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [retry.FIRST_TRY]
    assert (tmp_path / retry.FIRST_TRY / "junit.xml").read_text() == "<first/>"


def test_flaky_nights_of_a_board_are_counted_over_its_models(tmp_path: Path) -> None:
    for number in range(1, 25):
        history.append(tmp_path, night(number, flaky="deploy: lost" if number in (1, 20) else ""))
        history.append(tmp_path, night(number, model="other", flaky="power on: relay" if number == 24 else ""))
    nights = history.of_board(tmp_path, "virtual")
    assert [entry.started for entry in nights] == sorted(entry.started for entry in nights)
    assert retry.flaky(nights) == "virtual needed a second try in 2 of its last 30 nights"
    assert retry.flaky(night(number) for number in range(1, 5)) == ""

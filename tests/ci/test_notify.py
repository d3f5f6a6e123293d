"""One notification per change of state; a board's text reaches the command only as data."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from axrun.errors import BadInput
from ci.nightly import notify
from ci.nightly.history import Night
from tests.ci.test_history import night

HOSTILE = "x'; touch /tmp/owned; $(reboot) `id` \x1b[2J\x07 \x00 end"


def red(reason: str = "deploy: the disk of virtual has 24 MB free", **said: object) -> Night:
    return night(1, verdict="red", reason=reason, stage="deploy", **said)


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        (None, night(), ""),
        (None, red(), "the first night is red"),
        (None, night(flaky="deploy: lost"), "the first night is flaky"),
        (night(), night(), ""),
        (night(), red(), "green -> red"),
        (red(), night(), "red -> green"),
        (red(), red(), ""),
        (red("deploy: 24 MB free in a1b2c3d4 (and 2 more)"), red("deploy: 31 MB free in 9f8e7d6c"), ""),
        (red(), red("deploy: virtual does not answer"), "red for another reason"),
        (night(), night(flaky="deploy: lost"), "flaky"),
        (night(flaky="deploy: lost"), night(flaky="power on: relay"), ""),
        (night(flaky="deploy: lost"), night(), "flaky no more"),
        (night(flaky="deploy: lost"), red(), "green -> red"),
        (red(flaky="deploy: lost"), red(), ""),
    ],
)
def test_one_notification_per_change_of_state(before: Night | None, now: Night, told: str) -> None:
    assert notify.change(before, now) == told


def test_the_command_gets_text_and_facts_and_no_shell(tmp_path: Path) -> None:
    file = tmp_path / "got it.json"
    code = "import json,os,sys; json.dump([sys.argv[2:], sys.stdin.read(), dict(os.environ)], open(sys.argv[1], 'w'))"
    words = notify.words(f"""'{sys.executable}' -c "{code}" '{file}' '$(id)' a\\ b""")
    now = red(HOSTILE, culprit="abc1234 subject")
    facts = notify.facts("green -> red", night(), now, f"red: {HOSTILE}", tmp_path / "report.html")
    assert notify.send(words, f"red: {HOSTILE}\nsecond", facts) == ""
    arguments, stdin, environment = json.loads(file.read_text())
    assert arguments == ["$(id)", "a b"]
    shown = "x'; touch /tmp/owned; $(reboot) `id` \ufffd[2J\ufffd \ufffd end"
    assert stdin == f"red: {shown}\nsecond\n"
    assert environment["NIGHT_REASON"] == shown
    assert environment["NIGHT_CHANGE"] == "green -> red"
    assert environment["NIGHT_WAS"] == "green"
    assert json.loads(environment["NIGHT_JSON"])["culprit"] == "abc1234 subject"


def test_a_failed_notification_is_reported() -> None:
    command = [sys.executable, "-c", "print('no route\\x1b to the relay'); raise SystemExit(3)"]
    told = notify.send(command, "text", {})
    assert told == f"the notification by {sys.executable} was not sent: it ended with 3: no route\ufffd to the relay"
    assert notify.send(["/nonexistent/mail"], "text", {}).endswith("was not sent: No such file or directory")


def test_it_may_not_take_long() -> None:
    started = time.monotonic()
    told = notify.send([sys.executable, "-c", "import time; time.sleep(600)"], "text", {}, seconds=1)
    assert told.endswith("was not sent: it did not finish within 1 s")
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(("command", "told"), [("mail 'x", "No closing quotation"), ("nomail", "there is no command")])
def test_a_command_that_cannot_be_run_is_refused(command: str, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        notify.words(command)
    assert notify.words("") == []

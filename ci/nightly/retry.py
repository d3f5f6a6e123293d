"""Retry policy: a failure of network or board (SSH or rsync lost, relay, no boot) is retried once per night.

Failures of the code are not: builds, gates, wrong answers, errors of a command, timeouts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from ci.nightly.history import Night
from ci.nightly.stage import TIMED_OUT, Stage

FIRST_TRY = "first-try"  # subfolder of the night for the files of the first attempt
WRITTEN = ("junit.xml", "figures.json", "benchmark.json", "deployed.json")
LAST = 30  # nights over which flaky ones are counted
POWER = ("power on", "power off")
# The messages of a lost board or connection: of connection.py and ssh.py in ci/device, of on_board.py and conftest.py
# in tests/hil. {board} is the board's name.
LOST = (
    r"{board} was lost during \w+",
    r"{board} did not answer \w+ in \d+ s",
    r"{board}: rsync did not finish within",
    r"rsync to {board}: ",
    r"\S+@\S+ port \d+ cannot be reached: ",
    r"{board} hangs: no answer to ",
    r"{board} hangs or is gone: ",
    r"{board} does not answer over SSH",
    r"{board} was started anew during the tests",
)


def cause(done: Stage, tests: Sequence[str], board: str) -> str:
    """The failure of network or board that made a stage fail; empty for any other cause.

    `tests` are the messages of failed board tests, if the stage ran any.
    """
    if done.name in POWER:
        return _first_line(done.reason) if done.code in (1, TIMED_OUT) else ""
    if done.code == TIMED_OUT or done.name not in ("deploy", "measure", "soak"):
        return ""
    said = [_first_line(text) for text in tests] if tests else [_first_line(done.reason)]
    return said[0] if said and all(lost(text, board) for text in said) else ""


def lost(reason: str, board: str) -> bool:
    """Whether a reason reports a lost board or connection."""
    return any(re.match(pattern.format(board=re.escape(board)), reason) for pattern in LOST)


def set_aside(folder: Path) -> None:
    """Moves the results of the first attempt out of the way."""
    for name in WRITTEN:
        if (folder / name).exists():
            (folder / FIRST_TRY).mkdir(exist_ok=True)
            (folder / name).rename(folder / FIRST_TRY / name)


def flaky(nights: Iterable[Night]) -> str:
    """How many of the board's last nights needed a second try; empty for none."""
    last = list(nights)[-LAST:]
    count = sum(bool(night.flaky) for night in last)
    return f"{last[-1].board} needed a second try in {count} of its last {len(last)} nights" if count else ""


def _first_line(text: str) -> str:
    return text.partition("\n")[0]

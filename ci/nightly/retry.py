"""One retry for what the network or the board did to a night: SSH lost, relay, rsync, a board that did not come up.

Never for what the code did: builds, gates, wrong answers, a command that ended with an error or was not done in time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from ci.nightly.history import Night
from ci.nightly.stage import TIMED_OUT, Stage

FIRST_TRY = "first-try"  # the folder, in the night's, of what the first try wrote
WRITTEN = ("junit.xml", "figures.json", "benchmark.json", "deployed.json")
LAST = 30  # nights in which flaky ones are counted
POWER = ("power on", "power off")
# what connection.py and ssh.py of ci/device, on_board.py and conftest.py of tests/hil say when the board or the way to
# it is lost; {board} is the board's name
LOST = (
    r"{board} was lost during \w+",
    r"{board} did not answer \w+ in \d+ s",
    r"{board}: rsync was not done after",
    r"rsync to {board}: ",
    r"\S+@\S+ port \d+ cannot be reached: ",
    r"{board} hangs: no answer to ",
    r"{board} hangs or is gone: ",
    r"{board} does not answer over SSH",
    r"{board} was started anew during the tests",
)


def cause(done: Stage, tests: Sequence[str], board: str) -> str:
    """What the network or the board did to a stage that failed; empty where it was something else.

    `tests` are the messages of the board tests that failed, where the stage ran some.
    """
    if done.name in POWER:
        return _first_line(done.reason) if done.code in (1, TIMED_OUT) else ""
    if done.code == TIMED_OUT or done.name not in ("deploy", "measure", "soak"):
        return ""
    said = [_first_line(text) for text in tests] if tests else [_first_line(done.reason)]
    return said[0] if said and all(lost(text, board) for text in said) else ""


def lost(reason: str, board: str) -> bool:
    """Whether a reason says that the board or the way to it was lost."""
    return any(re.match(pattern.format(board=re.escape(board)), reason) for pattern in LOST)


def set_aside(folder: Path) -> None:
    """What the first try wrote makes room for what the second one does."""
    for name in WRITTEN:
        if (folder / name).exists():
            (folder / FIRST_TRY).mkdir(exist_ok=True)
            (folder / name).rename(folder / FIRST_TRY / name)


def flaky(nights: Iterable[Night]) -> str:
    """How often a board needed a second try in its last nights; empty where it never did."""
    last = list(nights)[-LAST:]
    count = sum(bool(night.flaky) for night in last)
    return f"{last[-1].board} needed a second try in {count} of its last {len(last)} nights" if count else ""


def _first_line(text: str) -> str:
    return text.partition("\n")[0]

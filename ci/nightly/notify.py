"""A note once per change of state of a board and a model, to a command that the user names: mail, chat, issue.

The command is split as a shell would and run without one. It gets the headline as text on stdin and the facts in its
environment; what a board said is in there as printable text of bounded length, and is run nowhere.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from axrun.errors import BadInput
from ci.device import bounded
from ci.nightly.history import Night

SECONDS = 60.0
MOST_TEXT = 2000  # characters of a fact
MOST_SAID = 1 << 16  # bytes of what the command says: its end
NUMBERS = re.compile(r"\b(?=\w*\d)[\w.+-]+")  # and digests: reasons that differ by them alone are the same
MORE = re.compile(r" \(and \d+ more\)")


def words(command: str) -> list[str]:
    """The command's words. Raises BadInput for one that cannot be run; empty where there is none."""
    try:
        found = shlex.split(command)
    except ValueError as error:
        raise BadInput(f"--notify {command!a:.80}: {error}; quote it as for a shell") from None
    if found and shutil.which(found[0]) is None:
        raise BadInput(f"--notify: there is no command {found[0]!a:.80}\nIt is run without a shell: name a program.")
    return found


def change(before: Night | None, night: Night) -> str:
    """What changed since the night before, in a few words; empty where nothing did."""
    if before is None:
        return "the first night is red" if not night.green else "the first night is flaky" if night.flaky else ""
    if before.verdict != night.verdict:
        return f"{before.verdict} -> {night.verdict}"
    if not night.green and _cause(before) != _cause(night):
        return "red for another reason"
    if night.green and bool(before.flaky) != bool(night.flaky):
        return "flaky" if night.flaky else "flaky no more"
    return ""


def facts(changed: str, before: Night | None, night: Night, headline: str, report: Path) -> dict[str, str]:
    """The variables that the command gets; NIGHT_JSON has them all in one."""
    found = {
        "change": changed,
        "headline": headline,
        "board": night.board,
        "model": night.model,
        "verdict": night.verdict,
        "reason": night.reason,
        "stage": night.stage,
        "was": before.verdict if before else "",
        "was_reason": before.reason if before else "",
        "flaky": night.flaky,
        "culprit": night.culprit,
        "commit": night.commit,
        "started": night.started,
        "report": str(report),
    }
    shown = {name: printable(value) for name, value in found.items()}
    return {**{f"NIGHT_{name.upper()}": value for name, value in shown.items()}, "NIGHT_JSON": json.dumps(shown)}


def send(command: Sequence[str], text: str, variables: Mapping[str, str], seconds: float = SECONDS) -> str:
    """Runs the command; returns what went wrong, empty when all is well.

    It is done when the command has ended; what that leaves in the background is its own.
    """
    what = f"the note by {command[0]}"
    lines = "\n".join(printable(line) for line in text.splitlines())
    with tempfile.TemporaryFile() as given:
        given.write(f"{lines}\n".encode())
        given.seek(0)
        try:
            done = bounded.run(
                command,
                seconds=seconds,
                most=MOST_SAID,
                environment={**os.environ, **variables},
                stdin=given,
                drains=True,
            )
        except OSError as error:
            return f"{what} was not sent: {error.strerror}"
    if done.code is None:
        return f"{what} was not sent: it was not done after {seconds:.0f} s"
    if done.code:
        said = (done.stdout + b"\n" + done.stderr).decode("utf-8", "replace")
        last = [line for line in said.splitlines() if line.strip()] or ["it said nothing"]
        return f"{what} was not sent: it ended with {done.code}: {printable(last[-1])[:200]}"
    return ""


def printable(text: str) -> str:
    """In one line, without control characters."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "�" for c in text[:MOST_TEXT])


def _cause(night: Night) -> tuple[str, str]:
    """Why a night is red, without the numbers of that night."""
    return night.stage, NUMBERS.sub("#", MORE.sub("", night.reason))

"""Notifications: runs a command of the user (mail, chat, issue) once per change of state of a board and a model.

The command is split like a shell command but run without a shell. It gets the headline on stdin and the facts in its
environment. Text that came from a board is made printable and bounded, and never interpreted.
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
MOST_SAID = 1 << 16  # bytes kept of the command's output
NUMBERS = re.compile(r"\b(?=\w*\d)[\w.+-]+")  # and digests: reasons that differ only in these are the same
MORE = re.compile(r" \(and \d+ more\)")


def words(command: str) -> list[str]:
    """The command's words, empty for an empty command. Raises BadInput for one that cannot be run."""
    try:
        found = shlex.split(command)
    except ValueError as error:
        raise BadInput(f"--notify {command!a:.80}: {error}; quote it as for a shell") from None
    if found and shutil.which(found[0]) is None:
        raise BadInput(
            f"--notify: there is no command {found[0]!a:.80}\nThe command runs without a shell: name a program."
        )
    return found


def change(before: Night | None, night: Night) -> str:
    """The change of state since the previous night, in a few words; empty if there is none."""
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
    """The environment variables for the command; NIGHT_JSON has all of them."""
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
    """Runs the command and waits for it; returns an error text, empty on success.

    Processes that it leaves in the background are not waited for.
    """
    what = f"the notification by {command[0]}"
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
        return f"{what} was not sent: it did not finish within {seconds:.0f} s"
    if done.code:
        said = (done.stdout + b"\n" + done.stderr).decode("utf-8", "replace")
        last = [line for line in said.splitlines() if line.strip()] or ["it printed nothing"]
        return f"{what} was not sent: it ended with {done.code}: {printable(last[-1])[:200]}"
    return ""


def printable(text: str) -> str:
    """The text on one line, without control characters."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "�" for c in text[:MOST_TEXT])


def _cause(night: Night) -> tuple[str, str]:
    """Why a night is red, with the numbers masked."""
    return night.stage, NUMBERS.sub("#", MORE.sub("", night.reason))

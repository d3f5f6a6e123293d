"""Walks the stages in order and stops at the first that disagrees."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from typing import Union

from axrun.doctor.report import AGREES, DISAGREES, LEFT, STAGES, Finding, Report, Walked
from axrun.errors import Failure
from axrun.progress import Progress, Show, unseen

# A stage returns how far it looked, or what disagrees. It raises NotExamined where it cannot tell.
Stage = Callable[[], Union[str, Finding]]
Say = Callable[[str], None]


UNREAD = "cannot read "  # as messages of readers begin where the system refuses


class NotExamined(Exception):
    """A stage cannot be compared with anything here; its text says why, and what would let it."""


def walk(report: Report, stages: Mapping[str, Stage], show: Show = unseen) -> Report:
    """Runs the stages in the order of STAGES, and adds to `report` what they say.

    A stage that is not among `stages`, or raises NotExamined, is left and the walk goes on; any other Failure that a
    stage raises is what it found. `show` is told before each stage.
    """
    for number, name in enumerate(STAGES, 1):
        show(Progress(number, len(STAGES), name))
        started = time.monotonic()
        outcome, text = AGREES, ""
        try:
            found = stages[name]() if name in stages else _missing(name)
            if isinstance(found, Finding):
                report.finding = found
                outcome, text = DISAGREES, found.part
            else:
                text = found
        except NotExamined as left:
            outcome, text = LEFT, str(left)
        except Failure as failure:
            report.finding = refused(name, failure)
            outcome, text = DISAGREES, report.finding.part
        if report.finding and not report.finding.file:
            report.finding = dataclasses.replace(report.finding, file=_named(report.finding.seen, report.bundle))
        report.walked.append(Walked(name, outcome, text, time.monotonic() - started))
        if report.finding:
            break
    return report


def refused(stage: str, failure: Failure, part: str = "cannot be read", file: str = "") -> Finding:
    """The finding for what a reader of ours refuses: its first line is what was seen, its last what to do."""
    seen, _, advice = str(failure).partition("\n")
    return Finding(
        stage,
        part,
        file,
        f"what the stage {stage} needs can be read and run",
        seen,
        "damaged, incomplete or made for something else",
        advice.replace("\n", " ") or "Build or copy the bundle again.",
    )


def _named(seen: str, bundle: str) -> str:
    """The file of the bundle that a message begins with, or says that it cannot read; empty where there is none."""
    start = seen[len(UNREAD) :] if seen.startswith(UNREAD) else seen
    path = start.partition(": ")[0].partition(" ")[0]
    inside = path.startswith(f"{bundle}/") and os.path.isfile(path)
    return path[len(bundle) + 1 :] if inside else ""


def _missing(name: str) -> str:
    raise NotExamined(f"this command does not look at {name}")

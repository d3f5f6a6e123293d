"""Runs the stages in order up to the first that disagrees."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from typing import Union

from axrun.doctor.report import AGREES, DISAGREES, SKIPPED, STAGES, Finding, Report, StageResult
from axrun.errors import Failure
from axrun.progress import Progress, Show, unseen

# A stage returns a description of what it examined, or a Finding. It raises NotExamined if it cannot decide.
Stage = Callable[[], Union[str, Finding]]
Say = Callable[[str], None]


UNREAD = "cannot read "  # prefix of messages about I/O errors


class NotExamined(Exception):
    """A stage cannot be examined; the message says why, and what is needed."""


def run_stages(report: Report, stages: Mapping[str, Stage], show: Show = unseen) -> Report:
    """Runs the stages in the order of STAGES, and adds their results to `report`.

    A stage that is not in `stages` or raises NotExamined is skipped; any other Failure that a stage raises becomes its
    finding. `show` is called before each stage.
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
            outcome, text = SKIPPED, str(left)
        except Failure as failure:
            report.finding = refused(name, failure)
            outcome, text = DISAGREES, report.finding.part
        if report.finding and not report.finding.file:
            report.finding = dataclasses.replace(report.finding, file=_named(report.finding.seen, report.bundle))
        report.results.append(StageResult(name, outcome, text, time.monotonic() - started))
        if report.finding:
            break
    return report


def refused(stage: str, failure: Failure, part: str = "cannot be read", file: str = "") -> Finding:
    """The finding for a Failure: its first line is what was seen, the rest is the advice."""
    seen, _, advice = str(failure).partition("\n")
    return Finding(
        stage,
        part,
        file,
        f"the inputs of the stage {stage} can be read and run",
        seen,
        "damaged, incomplete or made for another purpose",
        advice.replace("\n", " ") or "Build or copy the bundle again.",
    )


def _named(seen: str, bundle: str) -> str:
    """The file of the bundle at the start of a message, or after "cannot read"; empty if there is none."""
    start = seen[len(UNREAD) :] if seen.startswith(UNREAD) else seen
    path = start.partition(": ")[0].partition(" ")[0]
    inside = path.startswith(f"{bundle}/") and os.path.isfile(path)
    return path[len(bundle) + 1 :] if inside else ""


def _missing(name: str) -> str:
    raise NotExamined(f"this command does not examine {name}")

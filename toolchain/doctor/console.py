"""What `axc doctor` prints: progress on stderr, the report on stdout."""

from __future__ import annotations

import json
import sys

from board.doctor.report import Report
from board.errors import CheckFailed
from toolchain.doctor.case import Options
from toolchain.doctor.examine import doctor as examined


def doctor(options: Options, *, as_json: bool, board: str | None = None, model: str | None = None) -> None:
    """Raises BadInput, and CheckFailed where something disagrees."""
    report = examined(options, _say)
    if as_json:
        print(json.dumps(report.json()))
    else:
        print("\n".join(_lines(report)))
    sys.stdout.flush()
    if report.finding:
        raise CheckFailed(report.headline())


def _lines(report: Report) -> list[str]:
    return [f"{report.bundle}, made by {report.maker}, on {report.place} with engine {report.engine}", *report.lines()]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

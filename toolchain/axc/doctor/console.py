"""Output of `axc doctor`: progress on stderr, the report on stdout."""

from __future__ import annotations

import json
import sys
from typing import Any

from axc.doctor import on_board
from axc.doctor.case import Options
from axc.doctor.examine import doctor as examined
from axrun.doctor.report import Report
from axrun.errors import BadInput, CheckFailed
from axrun.progress import Progress


def doctor(options: Options, *, as_json: bool, board: str | None = None, model: str | None = None) -> None:
    """Examines the bundle here and, if given, on a `board`; in JSON that report is under `board`.

    Raises BadInput, also if the board gives no report, and CheckFailed if a stage disagrees.
    """
    if board is not None:
        on_board.expect(board)
    reports = [examined(options, _show, _detail)]
    failure: BadInput | None = None
    different = ""
    if board is not None:
        _say(f"examining the bundle on board {board} ...")
        try:
            reports.append(on_board.examine(board, model))
            different = on_board.other_bundle(reports[0], reports[1], board)
        except BadInput as refused:
            failure = refused
    if as_json:
        values: dict[str, Any] = reports[0].json()
        if board is not None:
            values["board"] = reports[1].json() if failure is None else {"error": str(failure).partition("\n")[0]}
        print(json.dumps(values))
    else:
        for report in reports:
            print("\n".join(_lines(report)))
    sys.stdout.flush()
    for report in reports:
        if report.finding:
            part = f"{report.finding.stage}: {report.finding.part}"
            raise CheckFailed(f"{report.bundle} on {report.place} is {report.verdict}: {part}")
    if different:
        raise CheckFailed(different)
    if failure is not None:
        raise failure


def _lines(report: Report) -> list[str]:
    return [f"{report.bundle}, made by {report.maker}, on {report.place} with engine {report.engine}", *report.lines()]


def _show(stage: Progress) -> None:
    _say(str(stage))


def _detail(line: str) -> None:
    if sys.stderr.isatty():
        _say(line)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

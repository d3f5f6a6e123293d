"""`invoke nightly --matrix` (many nights in one run) and `invoke site` (a site over the whole history)."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from axrun.errors import BadInput, Failure
from ci.nightly import matrix, matrix_run, run_folder, targets
from ci.nightly.pipeline import MOST_WAIT, limits
from ci.nightly.report import site as report_site
from ci.nightly.report.matrix import Page

KEPT_RUNS = 30  # folders of matrix pages

Say = Callable[[str], None]


def run_matrix(
    file: Path,
    out: Path,
    history: Path,
    model_dir: Path | None,
    wait: int,
    given: Sequence[str],
    say: Say,
    more: Sequence[str] = (),
) -> Page:
    """Runs the nights of a matrix and writes its page. Raises BadInput before anything is reserved.

    `out` is the folder of the bundles, `given` are stage limits as given to the task, `more` are further flags for each
    night.
    """
    limits(given)
    if not 0 <= wait < MOST_WAIT:
        raise BadInput(f"--wait {wait}: expected seconds, 0 to {MOST_WAIT:.0f}")
    found = matrix.read(file)
    plans = matrix.plans(found, history)
    for cell, plan in plans.items():
        for line in (plan.unjudged, *plan.notes):
            if line:
                say(f"[{cell.board.name} {cell.model.name}] {line}")
    started, clock = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), time.monotonic()
    folder = run_folder.new(out / "nightly" / "matrix", started, KEPT_RUNS)
    run = matrix_run.Run(found, folder, matrix_run.commands(out, history, model_dir, wait, given, more), say)
    results = run.run()
    page = Page(
        found, results, started, time.monotonic() - clock, folder, run.signals.reason.replace("night", "matrix")
    )
    page.write()
    return page


def site(history: Path, reports: Path, out: Path, goals: Path | None = None) -> Path:
    """Writes the site of a history to `out` and returns its index. Raises BadInput."""
    found = targets.read(goals) if goals else targets.read()
    return report_site.write(report_site.collect(history, reports, found), out)


def update_site(history: Path, reports: Path, say: Say, goals: Sequence[targets.Target] | None = None) -> None:
    """Updates the site next to the history after a night. A failure is reported but does not turn the night red."""
    try:
        found = report_site.collect(history, reports, targets.read() if goals is None else goals)
        say(f"site: {report_site.write(found, history / 'site')}")
    except Failure as failure:
        say(f"note: the site was not updated: {failure}")
    except Exception as error:  # our own bugs do not turn the night red either
        say(f"note: the site was not updated: {type(error).__name__}: {error}")

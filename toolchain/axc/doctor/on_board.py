"""`axc doctor --board`: what `axrun doctor` says on a board, by the checkout's own task. The compiler has no SSH."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from axrun.doctor.report import Report
from axrun.errors import BadInput

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 3600.0
MOST_ERROR = 300  # characters


def examine(board: str, model: str | None) -> Report:
    """The report of a board's current release; `model` is the name it must have been deployed under.

    Raises BadInput outside of a checkout, and where the board gives no report.
    """
    if not (ROOT / "tasks.py").is_file():
        raise BadInput(
            f"--board needs a checkout of the project, with tasks.py; {ROOT} has none\n"
            "Run it there, or `axrun doctor` on the board itself."
        )
    command = [sys.executable, "-m", "invoke", "board.doctor", "--board", board, "--json"]
    command += ["--model", model] if model else []
    try:
        ran = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, errors="replace",
            timeout=SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise BadInput(f"board {board} was not done after {SECONDS:.0f} s\nRun `axrun doctor` there.") from None
    for line in reversed(ran.stdout.splitlines()):
        if line.startswith("{"):
            try:
                return Report.parse(json.loads(line))
            except (ValueError, RecursionError):
                break
    said = [line for line in ran.stderr.splitlines() if line.strip()] or [f"exit code {ran.returncode}"]
    errors = [line.partition("error: ")[2] for line in said if line.startswith("error: ")]
    raise BadInput(f"board {board} gave no report: {(errors or said)[-1][:MOST_ERROR]}\nSee docs/boards.md.")

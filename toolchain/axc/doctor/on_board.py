"""`axc doctor --board`: runs `axrun doctor` on a board through the checkout's Invoke task; axc itself has no SSH."""

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


def expect(board: str) -> None:
    """Raises BadInput outside a checkout and for an unknown board, before anything is examined."""
    if not (ROOT / "tasks.py").is_file():
        raise BadInput(
            f"--board needs a checkout of the project, with tasks.py; {ROOT} has none\n"
            "Run it there, or `axrun doctor` on the board itself."
        )
    known = sorted(path.stem for path in (ROOT / "ci" / "boards").glob("*.yaml"))
    if board not in known and not Path(board).is_file():
        raise BadInput(f"no board is named {board!r:.60}: there are {', '.join(known)}\nOr give the path of its YAML.")


def other_bundle(here: Report, there: Report, board: str) -> str:
    """An error text if the board has another bundle than the one examined here; empty if not, or if unknown."""
    if not there.manifest or not here.manifest or there.manifest == here.manifest:
        return ""
    return (
        f"board {board} has another bundle (manifest {there.manifest[:12]}) than {here.bundle} "
        f"(manifest {here.manifest[:12]})\nDeploy it first: invoke deploy --board {board}"
    )


def examine(board: str, model: str | None) -> Report:
    """The report of a board's current release; `model` is the expected name of its bundle.

    Raises BadInput, with the task's advice, if the board gives no report.
    """
    command = [sys.executable, "-m", "invoke", "board.doctor", "--board", board, "--json"]
    command += ["--model", model] if model else []
    try:
        ran = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, errors="replace",
            timeout=SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise BadInput(f"board {board} did not finish within {SECONDS:.0f} s\nRun `axrun doctor` there.") from None
    for line in reversed(ran.stdout.splitlines()):
        if line.startswith("{"):
            try:
                return Report.parse(json.loads(line))
            except (ValueError, RecursionError):
                break
    said = [line for line in ran.stderr.splitlines() if line.strip()] or [f"exit code {ran.returncode}"]
    first = next((index for index, line in enumerate(said) if line.startswith("error: ")), len(said) - 1)
    error, *advice = (line.removeprefix("error: ")[:MOST_ERROR] for line in said[first : first + 3])
    raise BadInput("\n".join([f"board {board} gave no report: {error}", *(advice or ["See docs/boards.md."])]))

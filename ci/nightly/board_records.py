"""Records of the board during a night: serial console, kernel log, health check, soak test, sensors.

Only the stages `health` and `soak` can turn a night red. A record that could not be made is a note.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from axrun.errors import Failure
from ci.device import console, kernel_log, sensors, strict_json
from ci.device.place import Board
from ci.nightly import metrics, soak, stage
from ci.nightly.health_log import BOARD
from ci.nightly.stage import Stage

ROOT = Path(__file__).resolve().parents[2]
HEALTH, SOAK, POWER_ON, MEASURE = "health", "soak", "power on", "measure"
HEALTH_FILE, SOAK_FILE = "health.json", "soak.json"
LIMITS = {HEALTH: 1800.0, SOAK: 7200.0}  # seconds
LOG_LIMIT = 30.0
CODE = ("build", "reference", "probe", "count", "package")  # stages that need no board
ARTIFACTS = {
    HEALTH_FILE: "health check of the board before the night",
    SOAK_FILE: "soak test of axrun serve with concurrent users",
    console.NAME: "the board's serial console",
    kernel_log.NAME: "the board's kernel log, read before power-off",
}
CODE_NOTE = "code, not board: the board passed its health check with the known-good bundle before the night"


@dataclass(frozen=True)
class BoardDetails:
    """What the report shows of the board. `around` maps a failed stage to the last console lines at that moment."""

    health: Mapping[str, Any] = field(default_factory=dict)
    sensors: Mapping[str, Sequence[float]] = field(default_factory=dict)
    soak: Sequence[str] = ()
    around: Mapping[str, str] = field(default_factory=dict)
    kernel: str = ""


class BoardRecords:
    """The records of one night, in its folder. `notes` are for the report."""

    def __init__(self, board: Board, folder: Path, wait: Callable[[float], None] = time.sleep) -> None:
        self.board, self.folder, self._wait = board, folder, wait
        self.around: dict[str, str] = {}
        self.notes: list[str] = []
        self._recording: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        """Starts recording, before power-on."""
        with contextlib.suppress(OSError):
            self._recording = console.start(self.board, self.folder / console.NAME)

    def failed(self, done: Stage) -> None:
        """Keeps the last console lines for a failed stage."""
        if self._recording is not None:
            self._wait(console.FLUSH_SECONDS)
            if said := console.tail(self.folder / console.NAME):
                self.around[done.name] = said

    def log(self, stages: Sequence[Stage]) -> None:
        """Saves the kernel log of a board that is still on."""
        if not any(done.name == POWER_ON and not done.failed for done in stages):
            return
        if self.board.emulated:
            return  # its kernel is the host's
        file = self.folder / kernel_log.NAME
        command = [sys.executable, "-m", "ci.device.kernel_log", str(self.board.yaml), str(file)]
        try:
            done = stage.run(
                "kernel log", command, limit=LOG_LIMIT, console=file.with_suffix(".txt"), cwd=ROOT,
                environment=self.board.variables(),
            )  # fmt: skip
        except Failure as failure:
            self.notes.append(str(failure))
            return
        if done.failed:
            self.notes.append(done.reason)

    def end(self) -> None:
        """Stops recording, after power-off."""
        if self._recording is not None:
            console.stop(self._recording)
            self._recording = None
        said = console.tail(self.folder / console.NAME)
        for line in said.splitlines():
            if "[no serial console: " in line:
                self.notes.append(line.partition("[")[2].rstrip("]"))

    def health(self, history: Path, base: Path) -> list[str]:
        """The command of the health stage."""
        return ["ci.nightly.health", *map(str, (self.board.yaml, history.resolve(), base, self.folder / HEALTH_FILE))]

    def soak(self, deployed: Path, long: bool) -> list[str]:
        """The command of the soak stage."""
        requests = soak.LONG if long else soak.SHORT
        return ["ci.nightly.soak", str(self.board.yaml), str(deployed), str(self.folder / SOAK_FILE), str(requests)]

    def details(self, figures: Mapping[str, Any]) -> BoardDetails:
        """The board's section of the report; `figures` is the content of figures.json."""
        health, soaked = (
            strict_json.read_or_nothing(self.folder / HEALTH_FILE),
            strict_json.read_or_nothing(self.folder / SOAK_FILE),
        )
        read = figures.get("sensors")
        summary = read.get("summary") if isinstance(read, dict) else None
        kernel = console.tail(self.folder / kernel_log.NAME) if self.around else ""
        return BoardDetails(health, _rows(summary), _soak_lines(soaked), dict(self.around), kernel)

    def all_notes(self, figures: Mapping[str, Any]) -> list[str]:
        """Notes of health check, sensors, soak, console and kernel log."""
        health, read = strict_json.read_or_nothing(self.folder / HEALTH_FILE), figures.get("sensors")
        notes = [f"health: {note}" for note in health.get("notes", []) if "the host's" not in note]
        if isinstance(read, dict) and not (self.board.emulated and not read.get("summary")):
            notes += [str(note)[:300] for note in read.get("notes", [])]
        return [*notes, *self.notes]

    def versions(self) -> dict[str, str]:
        """The versions that the health check read, except those the measurement reports too."""
        found = strict_json.read_or_nothing(self.folder / HEALTH_FILE).get("versions", {})
        named = found if isinstance(found, dict) else {}
        return {str(name): str(value) for name, value in named.items() if name not in ("system", "python")}

    def soaked(self) -> dict[str, float]:
        """The figures of the soak test."""
        found = strict_json.read_or_nothing(self.folder / SOAK_FILE).get("figures", {})
        return {str(name): float(value) for name, value in found.items() if metrics.is_figure(value)}


def blame(stages: Sequence[Stage], failed: str, red: bool, worse: bool) -> str:
    """`board`, `code`, or empty if unknown. `failed` is the verdict's stage, `worse` whether figures missed gates."""
    if not red:
        return ""
    if failed in (HEALTH, POWER_ON):
        reason = next((done.reason for done in stages if done.name == failed), "")
        return "board" if failed == POWER_ON or reason.startswith(BOARD) else "code"
    healthy = any(done.name == HEALTH and not done.failed for done in stages)
    broke = any(done.name == failed and done.outcome == "failed" for done in stages)  # neither timed out nor killed
    return "code" if healthy and broke and (failed in CODE or (failed == MEASURE and worse)) else ""


def _rows(summary: Any) -> dict[str, list[float]]:
    """Minimum, median and maximum per sensor; entries of the (untrusted) file that are not that are skipped."""
    if not isinstance(summary, dict):
        return {}
    rows = {str(name)[:80]: value for name, value in list(summary.items())[: 2 * sensors.MOST_SENSORS]}
    return {
        name: [float(entry) for entry in value]
        for name, value in rows.items()
        if isinstance(value, list) and len(value) == 3 and all(type(entry) in (int, float) for entry in value)
    }


def _soak_lines(found: Mapping[str, Any]) -> list[str]:
    return [str(line) for line in found.get("told", [])]

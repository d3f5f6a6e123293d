"""Diagnosis of a red night: `axc doctor` on this machine and `axrun doctor` of the current release on the board.

    python -m ci.device.doctor BOARD OUT --bundle DIR --checkpoint DIR [--deployed] --seconds S

examines the bundle on this machine and, with --deployed, on the board, and writes both reports to the file OUT. A
doctor that failed is noted there too; it never replaces the reason of the night.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from axrun.doctor.report import STAGES, Finding, Report
from axrun.errors import BadInput, CheckFailed, Failure
from ci.device import place, strict_json
from ci.device.connection import Connection
from ci.device.place import Address, Board

STAGE = "doctor"  # of a night
FILE = "doctor.json"
SCHEMA = 1
SECONDS = 900.0  # for `axrun doctor` on a board
MOST_FILE = 1 << 20  # bytes
MOST_ERROR = 300  # characters
SPARE = 20.0  # seconds reserved for writing the result
# Failed stages that leave a bundle to examine; after those of DEPLOYED it is on the board too.
BUILT = ("build", "reference", "probe", "count", "package", "deploy")
DEPLOYED = ("measure",)


@dataclass(frozen=True)
class Diagnosis:
    """Reports by the machine that made them, and failures of doctors."""

    reports: dict[str, Report] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def finding(self) -> Finding | None:
        """The finding of the earliest stage, because later stages inherit its error; this machine first."""
        found = [report.finding for report in self.reports.values() if report.finding]
        order = list(STAGES)
        return min(found, key=lambda finding: order.index(finding.stage)) if found else None

    def first(self, reason: str) -> str:
        """The reason of a red night: the doctor's finding, then the night's own reason."""
        finding = self.finding
        if finding is None:
            return reason
        where = f" ({finding.file})" if finding.file else ""
        return f"{finding.stage}: {finding.part}{where}: {finding.cause} ({reason})"

    def advice(self, otherwise: str) -> str:
        """The finding's advice, or `otherwise` without a finding."""
        return self.finding.advice if self.finding else otherwise

    def notes(self) -> Iterator[str]:
        """Notes for the report, the finding first."""
        if finding := self.finding:
            yield f"doctor: expected {finding.expected}; seen: {finding.seen}"
        for where, report in self.reports.items():
            yield f"doctor, {where}: {report.headline()}"
        for where, failure in self.failures.items():
            yield f"doctor, {where}: could not examine: {failure}"


def on_board(board: Board, at: Address, seconds: float = SECONDS, model: str = "") -> Report:
    """The report of `axrun doctor` for the current release of a board.

    `model` is the expected name of the bundle. Raises BadInput for another model or no release, CheckFailed if the
    doctor makes no report.
    """
    with Connection(board, at) as link:
        if model:
            current = link.call("facts")["current"]
            name = link.call("release", name=current).get("name") if current else None
            if name != model:
                raise BadInput(
                    f"{board.name} has {f'the model {name!a:.60}' if name else 'no release'}, expected {model!r}\n"
                    f"Deploy it first: invoke deploy --board {board.name} --model {model}"
                )
        said = link.call("examine", seconds + 60, engine=board.engine, limit=seconds)
    if said["code"] is None:
        raise CheckFailed(f"axrun doctor did not finish on {board.name} within {seconds:.0f} s")
    try:
        report = Report.parse(strict_json.loads(said["stdout"]))
    except ValueError as error:
        lines = [line for line in said["stderr"].splitlines() if line.startswith("error:")]
        why = ascii(lines[-1][:MOST_ERROR])[1:-1] if lines else f"its report cannot be read: {error!s:.80}"
        raise CheckFailed(f"axrun doctor on {board.name} ended with {said['code']}: {why}") from None
    report.place = board.name
    return report


def here(bundle: Path, checkpoint: Path, seconds: float) -> Report:
    """The report of `axc doctor` for a bundle on this machine. Raises CheckFailed if it makes none."""
    command = [sys.executable, "-m", "axc", "doctor", str(bundle), "--checkpoint", str(checkpoint), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    try:
        out, err = process.communicate(timeout=max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        raise CheckFailed(f"axc doctor did not finish within {seconds:.0f} s") from None
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    try:
        return Report.parse(strict_json.loads(out))
    except ValueError:
        lines = [line for line in err.splitlines() if line.strip()] or ["it printed nothing"]
        errors = [line.partition("error: ")[2] for line in lines if line.startswith("error: ")]
        raise CheckFailed(f"axc doctor: {(errors or lines)[-1][:MOST_ERROR]}") from None


def command(failed: str, board: Board, folder: Path, bundle: Path, checkpoint: Path, seconds: float) -> list[str]:
    """The command that examines the bundle after the failed stage; empty if there is nothing to examine."""
    if failed not in (*BUILT, *DEPLOYED) or not bundle.is_dir():
        return []
    words = [sys.executable, "-m", "ci.device.doctor", str(board.yaml), str(folder / FILE), "--bundle", str(bundle)]
    words += ["--checkpoint", str(checkpoint), "--seconds", f"{seconds:g}"]
    return [*words, *(["--deployed"] if failed in DEPLOYED else [])]


def read(file: Path) -> Diagnosis:
    """Reads the diagnosis of a night; empty if there is none or it is unreadable."""
    try:
        found = strict_json.read(file, MOST_FILE)
        if found.get("schema") != SCHEMA:
            return Diagnosis()
        reports = {str(where): Report.parse(report) for where, report in found["reports"].items()}
        return Diagnosis(reports, {str(where): str(why)[:MOST_ERROR] for where, why in found["failures"].items()})
    except (OSError, ValueError, KeyError, AttributeError, RecursionError):
        return Diagnosis()


def examine(board: Board, bundle: Path, checkpoint: Path, deployed: bool, seconds: float) -> Diagnosis:
    """Runs both doctors within `seconds`. A failure of one is noted and does not stop the other."""
    found, ends = Diagnosis(), time.monotonic() + seconds - SPARE
    try:
        found.reports["here"] = here(bundle, checkpoint, (ends - time.monotonic()) / (2 if deployed else 1))
    except (Failure, OSError) as failure:
        found.failures["here"] = _line(failure)
    if deployed:
        try:
            found.reports[board.name] = on_board(board, place.address(board), max(1.0, ends - time.monotonic()))
        except (Failure, OSError) as failure:
            found.failures[board.name] = _line(failure)
    return found


def write(file: Path, found: Diagnosis) -> None:
    reports: dict[str, Any] = {where: report.json() for where, report in found.reports.items()}
    text = json.dumps({"schema": SCHEMA, "reports": reports, "failures": found.failures}, indent=2) + "\n"
    new = file.with_name(f".{file.name}.new")
    new.write_text(text, "utf-8")
    os.replace(new, file)


def _line(failure: Exception) -> str:
    return str(failure).partition("\n")[0][:MOST_ERROR]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m ci.device.doctor")
    parser.add_argument("board")
    parser.add_argument("out", type=Path)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--deployed", action="store_true")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    options = parser.parse_args(argv)
    try:
        board = place.find(options.board)
        found = examine(board, options.bundle, options.checkpoint, options.deployed, options.seconds)
        write(options.out, found)
    except Failure as failure:
        print(f"error: {failure}")
        return failure.exit_code
    for where, report in found.reports.items():
        print(f"{where}, engine {report.engine}:")
        print("\n".join(report.lines()))
    if found.failures:
        print("error: " + "; ".join(f"{where}: {failure}" for where, failure in found.failures.items()))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

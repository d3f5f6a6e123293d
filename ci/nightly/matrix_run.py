"""The scheduler of a matrix: runs nights on all boards in parallel, and shared builds one at a time.

Every night (`invoke nightly`) and build (`ci.nightly.shared_build`) is a process in its own session. Only the scheduler
forwards signals to them, so that each can release its board. If the scheduler itself is killed, the kernel sends them
SIGTERM (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from axrun.errors import Failure
from ci.device import place
from ci.device.place import Board
from ci.nightly import stage, summary
from ci.nightly.matrix import Cell, Matrix
from ci.nightly.night import Signals
from ci.nightly.summary import Summary

ROOT = Path(__file__).resolve().parents[2]
PR_SET_PDEATHSIG = 1
PACKAGE = "package"  # a build of the runner package for a board
POLL = 0.1  # seconds
PATIENCE = 600.0  # seconds for all nights to switch their boards off after a signal
LONGEST_LINE = 1 << 16  # bytes of a line of a night's output
MOST_REASON = 400  # characters

Say = Callable[[str], None]


@dataclass(frozen=True)
class Commands:
    """The command lines of the jobs.

    night: (cell, folder of its build, file for its summary).
    build: (model, chip, folder).
    package: (board).
    Builds and packages run one at a time, because a compiler uses all cores and much memory.
    """

    night: Callable[[Cell, Path, Path], Sequence[str]]
    build: Callable[[str, str, Path], Sequence[str]]
    package: Callable[[Board], Sequence[str]]


@dataclass(frozen=True)
class CellResult:
    """The result of a night. `summary` is None if the night wrote none; `reason` then says why."""

    cell: Cell
    summary: Summary | None
    code: int
    reason: str
    seconds: float

    @property
    def headline(self) -> str:
        return self.summary.headline if self.summary else f"red: {self.cell.name}: {self.reason}"


@dataclass
class _Job:
    """A running process. Its output goes to `log`, and line by line, with `prefix`, to the console."""

    process: subprocess.Popen[bytes]
    stream: IO[bytes]
    prefix: str
    log: Path
    started: float
    said: bytes = b""
    lines: list[str] = field(default_factory=list)


@dataclass
class _Lane:
    """The queue of a board: its waiting nights, and the running one."""

    board: Board
    waiting: list[Cell]
    job: _Job | None = None
    cell: Cell | None = None


class Run:
    """One run of a matrix in `folder`."""

    def __init__(
        self,
        matrix: Matrix,
        folder: Path,
        commands: Commands,
        say: Say = lambda line: None,
    ) -> None:
        self.matrix, self.folder, self._commands, self._say = matrix, folder, commands, say
        self.builds = folder / "builds"
        self.signals = Signals()
        self.ran: dict[Cell, CellResult] = {}
        self._lanes = [
            _Lane(board, [cell for cell in matrix.cells if cell.board == board])
            for board in matrix.boards
            if any(cell.board == board for cell in matrix.cells)
        ]
        self._built: set[tuple[str, str]] = set()
        self._failed: set[tuple[str, str]] = set()
        self._building: tuple[tuple[str, str], _Job] | None = None
        self._selector = selectors.DefaultSelector()

    def run(self) -> list[CellResult]:
        """Runs every night; returns the results in the order of the matrix."""
        stage.adopt_orphans()
        others = set(stage.children(os.getpid()))
        try:
            with self.signals.caught():
                self._run_all()
                stage.sweep(others)
        finally:
            shutil.rmtree(self.builds, ignore_errors=True)
            self._selector.close()
        return [self.ran[cell] for cell in self.matrix.cells]

    def _run_all(self) -> None:
        ended = 0.0
        while any(lane.waiting or lane.job for lane in self._lanes) or self._building:
            if self.signals.reason and not ended:
                ended = time.monotonic()
                self._end(signal.SIGTERM)
            if ended and time.monotonic() > ended + PATIENCE:
                self._end(signal.SIGKILL)
            if not self.signals.reason:
                self._start()
            self._listen()
            self._collect()
            if self.signals.reason:
                for lane in self._lanes:
                    for cell in lane.waiting:
                        self._note(cell, 2, f"not held: {self.signals.reason.replace('the night', 'the matrix')}", 0.0)
                    lane.waiting = []

    def _start(self) -> None:
        """Starts the next build if none is running, and a night on every free board whose bundle is ready."""
        if self._building is None and (wanted := self._next_build()):
            what, where = wanted
            words = self._commands.build(what, where, self._place(wanted))
            if what == PACKAGE:
                words = self._commands.package(next(lane.board for lane in self._lanes if lane.board.name == where))
            self._building = wanted, self._run(words, f"build {what} for {where}", f"build-{what}-{where}")
        for lane in self._lanes:
            if lane.job is None and lane.waiting and set(self._needs(lane, 0)) <= self._built:
                cell = lane.cell = lane.waiting.pop(0)
                words = self._commands.night(cell, self._place(cell.build), self._summary(cell))
                name = f"{cell.board.name}-{cell.model.name}"
                with (self.folder / f"{name}.out").open("wb") as verdict:
                    lane.job = self._run(words, f"{cell.board.name} {cell.model.name}", name, verdict)

    def _next_build(self) -> tuple[str, str] | None:
        """The next build: first what the boards' next nights need, then what later ones need."""
        depth = max((len(lane.waiting) for lane in self._lanes), default=0)
        queue = (each for turn in range(depth) for lane in self._lanes for each in self._needs(lane, turn))
        return next((build for build in queue if build not in self._built), None)

    def _needs(self, lane: _Lane, turn: int) -> list[tuple[str, str]]:
        """The builds for a board's night number `turn`; no package if its bundle already failed to build."""
        if turn >= len(lane.waiting):
            return []
        build = lane.waiting[turn].build
        return [build] if build in self._failed else [build, (PACKAGE, lane.board.name)]

    def _run(self, words: Sequence[str], prefix: str, name: str, verdict: IO[bytes] | None = None) -> _Job:
        """Starts a process and forwards its output. The stdout of a night goes to the file `verdict` instead."""
        log = self.folder / f"{name}.log"
        log.write_bytes(b"")
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env={**{key: value for key, value in os.environ.items() if key != place.HELD}, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=verdict or subprocess.PIPE,
            stderr=subprocess.PIPE if verdict else subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        stream = process.stderr if verdict else process.stdout
        assert stream is not None
        job = _Job(process, stream, prefix, log, time.monotonic())
        os.set_blocking(stream.fileno(), False)
        self._selector.register(stream, selectors.EVENT_READ, job)
        self._say(f"[{prefix}] begins")
        return job

    def _listen(self) -> None:
        if not self._selector.get_map():
            time.sleep(POLL)
        for key, _ in self._selector.select(POLL):
            self._read(key.data)

    def _read(self, job: _Job) -> None:
        """Forwards new output of a job, in whole lines."""
        while not job.stream.closed:
            try:
                data = os.read(job.stream.fileno(), 1 << 16)
            except BlockingIOError:
                break
            if not data:
                self._close(job)
            *whole, job.said = (job.said + data).split(b"\n")
            if len(job.said) > LONGEST_LINE or (job.said and not data):
                whole, job.said = [*whole, job.said], b""
            for entry in whole:
                self._tell(job, entry[:LONGEST_LINE].decode("utf-8", "replace").rstrip("\r"))

    def _tell(self, job: _Job, text: str) -> None:
        shown = "".join(c if c.isprintable() or c == "\t" else "�" for c in text)
        job.lines = [*job.lines[-100:], shown]
        with job.log.open("a", encoding="utf-8") as log:
            log.write(f"{shown}\n")
        self._say(f"[{job.prefix}] {shown}")

    def _close(self, job: _Job) -> None:
        if not job.stream.closed:
            self._selector.unregister(job.stream)
            job.stream.close()

    def _collect(self) -> None:
        """Handles finished jobs."""
        if self._building and self._building[1].process.poll() is not None:
            wanted, job = self._building
            self._finish(job)
            self._building = None
            self._failed |= {wanted} if job.process.returncode else set()
            self._built.add(wanted)  # also if it failed: the nights read the failure from its record
        for lane in self._lanes:
            if lane.job is not None and lane.cell is not None and lane.job.process.poll() is not None:
                self._finish(lane.job)
                self._take(lane.cell, lane.job)
                lane.job = lane.cell = None
        waited = {cell.build for lane in self._lanes for cell in (*lane.waiting, *([lane.cell] if lane.cell else []))}
        for build in self._built - waited:
            shutil.rmtree(self._place(build), ignore_errors=True)

    def _finish(self, job: _Job) -> None:
        self._read(job)
        self._close(job)
        self._say(
            f"[{job.prefix}] ended after {time.monotonic() - job.started:.1f} s, exit code {job.process.returncode}"
        )

    def _take(self, cell: Cell, job: _Job) -> None:
        code, seconds = job.process.returncode, time.monotonic() - job.started
        try:
            found = summary.read(self._summary(cell))
        except Failure as failure:
            return self._note(cell, 1, str(failure), seconds)
        if found is None:
            errors = [text for text in job.lines if text.startswith("error: ")] or job.lines[-1:]
            how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            last = errors[-1].removeprefix("error: ") if errors else "it printed nothing"
            return self._note(cell, code if code > 0 else 1, f"it {how}: {last}", seconds)
        if code != found.code:  # it crashed after its verdict
            return self._note(
                cell, 1, f"its verdict is {found.word}, and the night ended with exit code {code}", seconds
            )
        self.ran[cell] = CellResult(cell, found, found.code, found.reason, seconds)
        return None

    def _note(self, cell: Cell, code: int, reason: str, seconds: float) -> None:
        self.ran[cell] = CellResult(cell, None, code, reason[:MOST_REASON], seconds)

    def _end(self, number: signal.Signals) -> None:
        jobs = [lane.job for lane in self._lanes if lane.job] + ([self._building[1]] if self._building else [])
        for job in jobs:
            with contextlib.suppress(ProcessLookupError):
                job.process.send_signal(number)

    def _place(self, build: tuple[str, str]) -> Path:
        return self.builds / "-".join(build)

    def _summary(self, cell: Cell) -> Path:
        return self.folder / f"{cell.board.name}-{cell.model.name}.json"


def commands(
    out: Path, history: Path, model_dir: Path | None, wait: int, limits: Sequence[str], more: Sequence[str] = ()
) -> Commands:
    """The `invoke` commands. `out` is the task's folder of bundles, `more` are further flags for each night."""
    python = [sys.executable, "-m"]
    where = ["--model-dir", str(model_dir.absolute())] if model_dir else []
    bounds = [word for entry in limits for word in ("--limit", entry)]

    def night(cell: Cell, built: Path, file: Path) -> Sequence[str]:
        return [
            *(*python, "invoke", "nightly", "--board", str(cell.board.yaml), "--model", cell.model.name),
            *("--out", str(out.absolute()), "--history", str(history.absolute()), "--wait", str(wait)),
            *("--built", str(built), "--summary", str(file), *where, *bounds, *more),
        ]

    def build(model: str, chip: str, folder: Path) -> Sequence[str]:
        return [*python, "ci.nightly.shared_build", model, chip, str(folder), *where, *bounds]

    def package(board: Board) -> Sequence[str]:
        return [
            *python,
            "invoke",
            "cross",
            "--board",
            str(board.yaml),
            "--out",
            str(out.absolute() / "nightly" / board.name),
        ]

    return Commands(night, build, package)


def _end_with_parent() -> None:
    """Runs in the child before exec: asks the kernel for SIGTERM when the parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

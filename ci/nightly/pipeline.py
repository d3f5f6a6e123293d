"""The stages of a night, in order; each is a command with a time limit and a console log in the night's folder."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from axc.fetch import fetch
from axrun.errors import BadInput, Failure
from axrun.format import logits
from axrun.format.bundle import Bundle, read_manifest
from axrun.format.logits import NAME as REFERENCE
from ci.device import doctor, evidence, holding, place, power
from ci.device.holding import Holding
from ci.device.place import Board
from ci.nightly import board_records, built, instructions, retry, stage
from ci.nightly.junit import failures
from ci.nightly.stage import Stage
from ci.nightly.variant import Variant

ROOT = Path(__file__).resolve().parents[2]
TEXT = ROOT / "models" / "tiny-qwen2" / "heldout.txt"  # the text for accuracy, for every model
# Flags of axc reference besides --window and --tokens. A window covers the whole context and so every shape group.
ACCURACY = {"top_k": 1024, "greedy_tokens": 8}
WINDOWS, POSITIONS = 2, 1024  # the least size of a reference
MOST_WINDOW = 8192  # bounds the memory for computing the reference
BYTES_A_TOKEN = 8  # upper bound for TEXT, with any tokenizer
CHIPS = {"ax630c": "AX620E"}  # boards with another chip than models/*.toml names
MEASURE = "measure"
INSTRUCTIONS = "instructions.json"  # output of ci/nightly/instructions.py
PROBE = "probe.json"  # output of ci/nightly/probe.py
DEPLOYED = "deployed.json"  # copy of the deploy record, in the night's folder
ON_BOARD = 0.4  # share of the time limit of MEASURE for each of the two commands on the board

# time limit of each stage in seconds; --limit overrides it
LIMITS = {
    "power on": 2400.0,
    "build": 3600.0,
    "reference": 3600.0,
    "probe": 300.0,
    "count": 1200.0,
    "package": 1800.0,
    "deploy": 1800.0,
    MEASURE: 3600.0,
    doctor.STAGE: 1800.0,
    **board_records.LIMITS,
    "power off": 300.0,
}
BISECT, BISECT_SECONDS = "bisect", 4 * 3600.0  # limit for all steps together: ci/nightly/bisection.py

BOOT_SECONDS = 180.0
MOST_WAIT = 1e6  # seconds of --wait

Say = Callable[[str], None]


class Interrupted(BaseException):
    """A signal arrived while waiting for the board; the argument names it."""


class StageFailed(Exception):
    """A stage failed; the night stops here."""


class Reached(Exception):
    """The last requested stage is done."""


@dataclass(frozen=True)
class Options:
    """Options of a night.

    board, model: by name.
    out, history: the folders of reports and of past nights.
    bundle: a bundle built elsewhere, instead of a build.
    built: the folder of a shared build (ci/nightly/built.py).
    model_dir: the checkpoint, for a machine without network.
    wait: seconds to wait for a board that is in use.
    soak: run the long soak test.
    limits: stage time limits that override LIMITS.
    retry: retry a failure of network or board once.
    bisect: find the commit of a red night.
    notify: a command to run on a change of state.
    """

    board: str
    model: str
    out: Path
    history: Path
    bundle: Path | None = None
    built: Path | None = None
    model_dir: Path | None = None
    wait: float = 0.0
    soak: bool = False
    limits: Mapping[str, float] = dataclasses.field(default_factory=dict)
    retry: bool = True
    bisect: bool = False
    notify: str = ""

    def __post_init__(self) -> None:
        """Raises BadInput for an unknown stage, an invalid time, and two bundles."""
        if not 0 <= self.wait < MOST_WAIT:
            raise BadInput(f"--wait {self.wait:g}: expected seconds, 0 to {MOST_WAIT:.0f}")
        if self.bundle is not None and self.built is not None:
            raise BadInput("--bundle and --built both name a bundle: give one of them")
        for name, seconds in self.limits.items():
            if name not in (*LIMITS, BISECT) or not 0 < seconds < 1e6:
                raise BadInput(
                    f"--limit {name}={seconds:g}: expected seconds of a stage: {', '.join((*LIMITS, BISECT))}"
                )

    def limit(self, name: str) -> float:
        return self.limits.get(name, BISECT_SECONDS if name == BISECT else LIMITS[name])


class Pipeline:
    """Runs the stages of a night; `stages` has the results, in order."""

    def __init__(
        self,
        options: Options,
        board: Board,
        model: Variant,
        folder: Path,
        say: Say,
        stop: Callable[[], str],
        base: Path | None = None,
    ) -> None:
        self.options, self.board, self.model, self.folder = options, board, model, folder
        spec = self.spec = model.spec
        self.base = base or folder.parents[2]  # --out of build, cross and deploy
        self.bundle = self.base / spec.name
        self.deployed = evidence.place(self.base, board.name)
        self.stages: list[Stage] = []
        self.records = board_records.BoardRecords(board, folder)
        self.counts = board.emulated and not instructions.unavailable()
        self.unjudged = False  # whether there are no gates yet
        self.flaky = ""  # why the first attempt of a retried stage failed
        self.holding: Holding | None = None
        self.say, self._stop = say, stop
        # A bisection sets these to measure another commit, up to a certain stage.
        self.root, self.python = ROOT, sys.executable
        self.tests, self.needs_reference, self._last = ["tests/hil"], True, ""

    @property
    def interrupted(self) -> str:
        """Why to stop now; empty to go on."""
        return self._stop()

    def reserve(self, last: contextlib.ExitStack) -> None:
        """Reserves the board until `last` is closed. Raises StageFailed if somebody else holds it."""
        started, reason = time.monotonic(), ""
        try:
            what = f"nightly of {self.spec.name}"
            self.holding = last.enter_context(holding.hold(self.board, what, int(self.options.wait), self.say))
        except (Failure, Interrupted) as failure:
            reason = str(failure)
        self.note("reserve", started, reason, f"{self.board.name} is held by {place.owner()}")

    def require_built(self) -> None:
        """Fails early for a failed shared build, before reserving the board. Raises StageFailed."""
        if self.options.built is not None:
            started = time.monotonic()
            try:
                built.require(self.options.built, self.model, chip(self.board, self.model))
            except Failure as failure:
                self.note("build", started, str(failure), code=failure.exit_code)

    def note(self, name: str, started: float, reason: str, well: str = "", code: int = 2) -> None:
        """Adds a stage that ran in this process. It failed, with exit code `code`, if `reason` is not empty.

        Raises StageFailed for a failed stage.
        """
        console = self._console(name)
        console.write_text(f"error: {reason}\n" if reason else f"{well}\n", "utf-8")
        limit = self.options.limit(name) if name in LIMITS else self.options.wait
        self._add(Stage(name, code if reason else 0, time.monotonic() - started, limit, reason, console))

    def measure(self) -> None:
        """All stages from power-on to the soak test. Raises StageFailed."""
        self.records.begin()
        self.power_on()
        health = self.records.health(self.options.history, self.base)
        self._run(board_records.HEALTH, [self.python, "-m", *health])
        self._prepare()
        self._with_retry(self._measure_there)

    def measure_only(self, last: str, *, board: bool) -> None:
        """The stages up to `last`, for a bisection; with `board`, those on a board too. Raises StageFailed, Reached."""
        self._last = last
        self._prepare()
        if board:
            self._with_retry(self._measure_there)

    def power_on(self) -> None:
        """Raises StageFailed."""
        self._with_retry(self._power_on)

    def _power_on(self) -> None:
        if self.board.switch != "port":
            self._power_manually()
            return
        board = [str(self.board.yaml), str(self._boot_seconds())]
        self._run("power on", [self.python, "-m", "ci.device.power", "on", *board], leaves=True)

    def _prepare(self) -> None:
        """The stages that do not need the board. Raises StageFailed."""
        python = [self.python, "-m"]
        shutil.rmtree(self.bundle, ignore_errors=True)  # never reuse an earlier night's build
        if self.options.built is not None:
            self._share(self.options.built)
        elif self.options.bundle is None:
            self._run("build", [*python, "invoke", "build", *self._build_flags()])
        else:
            self._take(self.options.bundle)
        if self.needs_reference and (flags := self._reference_flags()):
            self._run("reference", [*python, "axc", "reference", *flags])
        self._run("probe", [*python, "ci.nightly.probe", str(self._tokenizer()), str(self.folder / PROBE)])
        if self.counts:
            self._run("count", [*python, "ci.nightly.instructions", str(self.bundle), str(self.folder / INSTRUCTIONS)])
        self._run("package", [*python, "invoke", "cross", *self._where()])

    def _measure_there(self) -> None:
        """The stages on the board: deploy, measure, soak. Raises StageFailed."""
        python = [self.python, "-m"]
        self.deployed.unlink(missing_ok=True)
        self._run("deploy", [*python, "invoke", "deploy", "--model", self.spec.name, *self._where()])
        with contextlib.suppress(OSError):
            shutil.copyfile(self.deployed, self.folder / DEPLOYED)
        self._run(MEASURE, [*python, "pytest", *self._hil_flags()])
        self._run(board_records.SOAK, [*python, *self.records.soak(self.deployed, self.options.soak)])

    def _where(self) -> list[str]:
        return ["--board", str(self.board.yaml), "--out", str(self.base)]

    def _with_retry(self, attempt: Callable[[], None]) -> None:
        """Runs `attempt`; if network or board made it fail, power-cycles the board and retries, once per night.

        Raises StageFailed.
        """
        try:
            attempt()
        except StageFailed:
            failed = self.stages[-1]
            why = retry.cause(failed, failures(self.folder / "junit.xml"), self.board.name)
            if not why or self.flaky or not self.options.retry or self._stop():
                raise
            self.flaky = f"{failed.name}: {why}"
            self.stages[-1] = dataclasses.replace(failed, excused="retried")
            cycle = "after a power cycle" if self.board.switch == "port" else "without a power cycle"
            self.say(f"retrying {failed.name} {cycle}: {why}")
            if failed.name not in retry.POWER:
                retry.set_aside(self.folder)
                self._power_on()
            attempt()

    def examine(self) -> None:
        """Runs the doctor to diagnose the failed stage; its result does not affect the verdict."""
        with contextlib.suppress(StageFailed, Failure):
            failed, checkpoint = self.stages[-1].name, fetch(self.spec, self.options.model_dir)
            seconds = self.options.limit(doctor.STAGE)
            command = doctor.command(failed, self.board, self.folder, self.bundle, checkpoint, seconds)
            if not command or self._stop():
                return
            try:
                self._run(doctor.STAGE, command)
            finally:
                self.stages[-1] = dataclasses.replace(
                    self.stages[-1], excused="failed (ignored)" if self.stages[-1].failed else ""
                )

    def _power_manually(self) -> None:
        """Waits for a person to switch the board on. Raises StageFailed if it does not answer."""
        started, reason, well = time.monotonic(), "", ""
        try:
            well = power.by_hand(self.board, self.say, self._boot_seconds(), self._stop)
        except Failure as failure:
            reason = str(failure)
        self.note("power on", started, reason, well)

    def power_off(self) -> None:
        """Always runs, and signals do not interrupt it. A board without a power port stays on."""
        stop, self._stop = self._stop, str
        self.records.log(self.stages)
        with contextlib.suppress(StageFailed):
            self._with_retry(self._power_off)
        self.records.end()
        self._stop = stop

    def _power_off(self) -> None:
        if self.board.switch != "port":
            return
        self._run("power off", [self.python, "-m", "ci.device.power", "off", str(self.board.yaml)])

    def _run(self, name: str, command: Sequence[str], *, leaves: bool = False) -> None:
        """Raises StageFailed."""
        self.say(f"{name} ...")
        started, limit = time.monotonic(), self.options.limit(name)
        variables = {**self.board.variables(), place.HELD: str(self.board.state), "PYTHONUNBUFFERED": "1"}
        if self.holding:
            self.holding.stage(name, power=name == "power on")
            variables |= self.holding.variables(temporary=not leaves)
        try:
            done = stage.run(
                name,
                command,
                limit=limit,
                console=self._console(name),
                cwd=self.root,
                environment=variables,
                leaves=leaves,
                stop=self._stop,
                say=self.say,
            )
        except Failure as failure:
            self.note(name, started, str(failure))
        else:
            self._add(done)

    def _add(self, done: Stage) -> None:
        """Raises StageFailed for one that failed."""
        self.stages.append(done)
        told = failures(self.folder / "junit.xml") if done.name == MEASURE and done.outcome == "failed" else []
        why = f": {told[0] if told else done.reason}" if done.failed else ""
        self.say(f"{done.name} {done.outcome} after {done.seconds:.1f} s{why}")
        if done.failed:
            self.records.failed(done)
            raise StageFailed
        if done.name == self._last:
            raise Reached

    def _take(self, bundle: Path) -> None:
        """Copies a bundle that was built elsewhere; the copy gets the reference logits. Raises StageFailed."""
        started, reason, maker = time.monotonic(), "", ""
        try:
            maker = read_manifest(bundle)["maker"]
            shutil.copytree(bundle, self.bundle)
        except Failure as failure:
            reason = str(failure)
        except OSError as error:
            reason = f"cannot copy {bundle}: {error.strerror or error}"
        self.note(stage.HANDED_IN, started, reason, f"{bundle}, made by {maker}, was built elsewhere; nothing to build")

    def _share(self, folder: Path) -> None:
        """Copies the shared build of a matrix. Raises StageFailed."""
        started, reason, code, well = time.monotonic(), "", 2, ""
        try:
            found = built.require(folder, self.model, chip(self.board, self.model))
            well = f"shared build of the matrix, made in {found.seconds:.1f} s: {folder}"
            shutil.copytree(folder / self.spec.name, self.bundle)
            shutil.copyfile(folder / built.CHECK, self.folder / built.CHECK)
        except Failure as failure:
            reason, code = str(failure), failure.exit_code
        except OSError as error:
            reason = f"cannot copy {folder}: {error.strerror or error}"
        self.note("build", started, reason, well, code)

    def _reference_flags(self) -> list[str]:
        """Flags of axc reference; empty if the bundle already has logits for the whole context.

        Raises StageFailed.
        """
        started = time.monotonic()
        try:
            return reference_flags(self.bundle, self.model, self.options.model_dir, self.folder / "text.txt")
        except Failure as failure:
            self.note("reference", started, str(failure))
            raise

    def _tokenizer(self) -> Path:
        """The tokenizer to compare the board's ids with: the checkpoint's, or that of a bundle built elsewhere."""
        return self.bundle / "hf" if self.options.bundle else fetch(self.spec, self.options.model_dir)

    def _boot_seconds(self) -> float:
        """The time for the board to answer after power-on; the rest of the limit is for switching."""
        return min(BOOT_SECONDS, self.options.limit("power on") / 2)

    def _build_flags(self) -> list[str]:
        made_for = chip(self.board, self.model)
        return build_flags(self.model, made_for, self.base, self.folder / built.CHECK, self.options.model_dir)

    def _hil_flags(self) -> list[str]:
        return [
            *(*self.tests, "--lg-env", str(self.board.yaml), "--hil-model", self.model.name),
            *("--hil-deployed", str(self.deployed), "--hil-figures", str(self.folder / "figures.json")),
            *("--hil-probe", str(self.folder / PROBE), "--hil-bundle", str(self.bundle)),
            *(["--hil-unjudged"] if self.unjudged else []),
            *("--hil-limit", str(ON_BOARD * self.options.limit(MEASURE))),
            *("--junitxml", str(self.folder / "junit.xml")),
            *("--benchmark-json", str(self.folder / "benchmark.json")),
            *("-p", "no:cacheprovider", "--tb=short", "-v"),
        ]

    def _console(self, name: str) -> Path:
        before = sum(done.name == name for done in self.stages)
        return self.folder / f"{name.replace(' ', '-')}{f'-{before + 1}' if before else ''}.log"


def chip(board: Board, model: Variant) -> str:
    """The target chip of a bundle for a board."""
    return CHIPS.get(board.name, model.spec.build.chip)


def build_flags(model: Variant, made_for: str, out: Path, report: Path, model_dir: Path | None) -> list[str]:
    """Flags of `invoke build` for a night: the bundle goes to `out`, the check's per-layer errors to `report`."""
    other = [] if made_for == model.spec.build.chip else ["--chip", made_for]
    more = ["--check_report", str(report), *model.flags(), *other]
    where = ["--model-dir", str(model_dir)] if model_dir else []
    return ["--model", model.spec.name, "--out", str(out), "--args", shlex.join(more), *where]


def reference_flags(bundle: Path, model: Variant, model_dir: Path | None, text: Path) -> list[str]:
    """Flags of axc reference; empty if the bundle already has logits for the whole context. Writes `text`.

    Raises BadInput.
    """
    context = Bundle.open(bundle).kv_cache_len
    if reaches(bundle, context):
        return []
    checkpoint = fetch(model.spec, model_dir)
    text.write_bytes(long_enough(TEXT.read_bytes(), context))
    return ["--input_path", str(checkpoint), "--text", str(text), "--bundle", str(bundle), *sizes(context)]


def sizes(context: int) -> list[str]:
    """Window flags of axc reference: windows as long as the context, so that they cross every shape group."""
    window = min(context + 1, MOST_WINDOW)
    tokens = max(WINDOWS, -(-POSITIONS // window)) * window
    values = {"window": window, "tokens": tokens, **ACCURACY}
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def long_enough(text: bytes, context: int) -> bytes:
    """The text, repeated if it is too short for the windows of `sizes`."""
    tokens = int(sizes(context)[3])
    return text * -(-tokens * BYTES_A_TOKEN // len(text))


def reaches(bundle: Path, context: int) -> bool:
    """Whether a bundle has reference logits up to the end of its context. Raises BadInput for damaged ones."""
    if REFERENCE not in read_manifest(bundle)["files"]:
        return False
    return bool(logits.read(bundle / REFERENCE).tokens.shape[1] > min(context, MOST_WINDOW - 1))


def limits(given: Sequence[str]) -> dict[str, float]:
    """Parses --limit options: `stage=seconds`. Raises BadInput."""
    found = {}
    for entry in given:
        name, _, seconds = entry.partition("=")
        if not re.fullmatch(r"\d{1,6}(\.\d+)?", seconds):
            raise BadInput(f"--limit {entry!r}: expected a stage and its seconds: measure=600")
        found[name] = float(seconds)
    return found

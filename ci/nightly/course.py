"""The stages of one night on a board, each a command with a time limit, in a folder of the night's own."""

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
TEXT = ROOT / "models" / "tiny-qwen2" / "heldout.txt"  # what accuracy is measured over, whatever the model
# Flags of axc reference beside --window and --tokens: a window is as long as the context and passes every shape group.
ACCURACY = {"top_k": 1024, "greedy_tokens": 8}
WINDOWS, POSITIONS = 2, 1024  # the fewest of a reference
MOST_WINDOW = 8192  # longer ones take more memory than the machine that computes the reference may have
BYTES_A_TOKEN = 8  # of TEXT, more than any tokenizer makes of it
CHIPS = {"ax630c": "AX620E"}  # boards whose chip is not the one of models/*.toml
MEASURE = "measure"
INSTRUCTIONS = "instructions.json"  # of ci/nightly/instructions.py
PROBE = "probe.json"  # of ci/nightly/probe.py
DEPLOYED = "deployed.json"  # the record of the deploy, in the folder of the night
ON_BOARD = 0.4  # of the time limit of MEASURE is what one command on the board may take: there are two

# seconds a stage may take, unless --limit says otherwise
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
BISECT, BISECT_SECONDS = "bisect", 4 * 3600.0  # a limit for all steps of a bisection (ci/nightly/bisection.py)

BOOT_SECONDS = 180.0
MOST_WAIT = 1e6  # seconds, for a board

Say = Callable[[str], None]


class Interrupted(BaseException):
    """A signal came while the board was waited for; its argument says so."""


class StageFailed(Exception):
    """The night goes no further than this stage."""


class Reached(Exception):
    """The last stage that is wanted is done."""


@dataclass(frozen=True)
class Options:
    """`board` and `model` by name; `out` is the folder of reports, `history` the folder of nights that were held.

    `bundle` is one that was built elsewhere, in place of a build; `built` the folder of a build that several boards
    share (ci/nightly/built.py); `model_dir` the checkpoint where there is no network. `wait` is how many seconds to
    wait for a board that is held, `soak` asks for the long one; `limits` override LIMITS. `retry`: what the network or
    the board did is tried once more. `bisect` names the commit of a red, `notify` is a command that is told of a change
    of state.
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
        """Raises BadInput for a limit of no stage, two bundles, and a time to wait that is none."""
        if not 0 <= self.wait < MOST_WAIT:
            raise BadInput(f"--wait {self.wait:g}: expected seconds, 0 to {MOST_WAIT:.0f}")
        if self.bundle is not None and self.built is not None:
            raise BadInput("--bundle and --built both bring a bundle: give one of them")
        for name, seconds in self.limits.items():
            if name not in (*LIMITS, BISECT) or not 0 < seconds < 1e6:
                raise BadInput(
                    f"--limit {name}={seconds:g}: expected seconds of a stage: {', '.join((*LIMITS, BISECT))}"
                )

    def limit(self, name: str) -> float:
        return self.limits.get(name, BISECT_SECONDS if name == BISECT else LIMITS[name])


class Course:
    """What happens in a night, and what became of it: `stages`, in their order."""

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
        self.base = base or folder.parents[2]  # what build, cross and deploy know as their --out
        self.bundle = self.base / spec.name
        self.deployed = evidence.place(self.base, board.name)
        self.stages: list[Stage] = []
        self.records = board_records.BoardRecords(board, folder)
        self.counts = board.emulated and not instructions.unable()
        self.unjudged = False  # the first nights of a maker have no gates
        self.flaky = ""  # what the network or the board did to the first try
        self.holding: Holding | None = None
        self.say, self._stop = say, stop
        # what is measured, and how far: other commits in a bisection
        self.root, self.python = ROOT, sys.executable
        self.tests, self.needs_reference, self._last = ["tests/hil"], True, ""

    @property
    def interrupted(self) -> str:
        """Why the night is to end now."""
        return self._stop()

    def reserve(self, last: contextlib.ExitStack) -> None:
        """The board is nobody else's until `last` is closed. Raises StageFailed when it is somebody's."""
        started, reason = time.monotonic(), ""
        try:
            what = f"nightly of {self.spec.name}"
            self.holding = last.enter_context(holding.hold(self.board, what, int(self.options.wait), self.say))
        except (Failure, Interrupted) as failure:
            reason = str(failure)
        self.note("reserve", started, reason, f"{self.board.name} is held by {place.owner()}")

    def require_built(self) -> None:
        """A shared build that failed is told before a board is held for it. Raises StageFailed."""
        if self.options.built is not None:
            started = time.monotonic()
            try:
                built.require(self.options.built, self.model, chip(self.board, self.model))
            except Failure as failure:
                self.note("build", started, str(failure), code=failure.exit_code)

    def note(self, name: str, started: float, reason: str, well: str = "", code: int = 2) -> None:
        """A stage that was no command of its own; `code` is for one that failed, which is one with a `reason`.

        Raises StageFailed for one that failed.
        """
        console = self._console(name)
        console.write_text(f"error: {reason}\n" if reason else f"{well}\n", "utf-8")
        limit = self.options.limit(name) if name in LIMITS else self.options.wait
        self._add(Stage(name, code if reason else 0, time.monotonic() - started, limit, reason, console))

    def measure(self) -> None:
        """Everything between holding the board and switching it off. Raises StageFailed."""
        self.records.begin()
        self.power_on()
        health = self.records.health(self.options.history, self.base)
        self._run(board_records.HEALTH, [self.python, "-m", *health])
        self._prepare()
        self._twice(self._measure_there)

    def measure_only(self, last: str, *, board: bool) -> None:
        """On a board that is on, where a `board` is needed. Raises StageFailed, Reached after the stage `last`."""
        self._last = last
        self._prepare()
        if board:
            self._twice(self._measure_there)

    def power_on(self) -> None:
        """Raises StageFailed."""
        self._twice(self._power_on)

    def _power_on(self) -> None:
        if self.board.switch != "port":
            self._power_by_hand()
            return
        board = [str(self.board.yaml), str(self._boot_seconds())]
        self._run("power on", [self.python, "-m", "ci.device.power", "on", *board], leaves=True)

    def _prepare(self) -> None:
        """What comes before the board is needed. Raises StageFailed."""
        python = [self.python, "-m"]
        shutil.rmtree(self.bundle, ignore_errors=True)  # a night builds anew, whatever the night before left
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
        """Deploys and measures. Raises StageFailed."""
        python = [self.python, "-m"]
        self.deployed.unlink(missing_ok=True)
        self._run("deploy", [*python, "invoke", "deploy", "--model", self.spec.name, *self._where()])
        with contextlib.suppress(OSError):
            shutil.copyfile(self.deployed, self.folder / DEPLOYED)
        self._run(MEASURE, [*python, "pytest", *self._hil_flags()])
        self._run(board_records.SOAK, [*python, *self.records.soak(self.deployed, self.options.soak)])

    def _where(self) -> list[str]:
        return ["--board", str(self.board.yaml), "--out", str(self.base)]

    def _twice(self, attempt: Callable[[], None]) -> None:
        """Once more where the network or the board made it fail, once in a night; after a power cycle, with a port.

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
            self.stages[-1] = dataclasses.replace(failed, excused="tried again")
            cycle = "after a power cycle" if self.board.switch == "port" else "without a power cycle"
            self.say(f"{failed.name} is tried once more, {cycle}: {why}")
            if failed.name not in retry.POWER:
                retry.set_aside(self.folder)
                self._power_on()
            attempt()

    def examine(self) -> None:
        """The doctor looks for what made the last stage fail; why the night is red does not depend on it."""
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
                    self.stages[-1], excused="failed, which does not count" if self.stages[-1].failed else ""
                )

    def _power_by_hand(self) -> None:
        """Raises StageFailed for a board that does not answer."""
        started, reason, well = time.monotonic(), "", ""
        try:
            well = power.by_hand(self.board, self.say, self._boot_seconds(), self._stop)
        except Failure as failure:
            reason = str(failure)
        self.note("power on", started, reason, well)

    def power_off(self) -> None:
        """Whatever happened before; a signal does not end it. A board that nothing switches stays on."""
        stop, self._stop = self._stop, str
        self.records.log(self.stages)
        with contextlib.suppress(StageFailed):
            self._twice(self._power_off)
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
        """A copy of a bundle that was built elsewhere: the reference logits are added to it. Raises StageFailed."""
        started, reason, maker = time.monotonic(), "", ""
        try:
            maker = read_manifest(bundle)["maker"]
            shutil.copytree(bundle, self.bundle)
        except Failure as failure:
            reason = str(failure)
        except OSError as error:
            reason = f"cannot copy {bundle}: {error.strerror or error}"
        self.note(stage.HANDED_IN, started, reason, f"{bundle}, made by {maker}, was handed in: nothing was built")

    def _share(self, folder: Path) -> None:
        """A copy of a build that other boards have too. Raises StageFailed."""
        started, reason, code, well = time.monotonic(), "", 2, ""
        try:
            found = built.require(folder, self.model, chip(self.board, self.model))
            well = f"built once for all boards of the matrix, in {found.seconds:.1f} s: {folder}"
            shutil.copytree(folder / self.spec.name, self.bundle)
            shutil.copyfile(folder / built.CHECK, self.folder / built.CHECK)
        except Failure as failure:
            reason, code = str(failure), failure.exit_code
        except OSError as error:
            reason = f"cannot copy {folder}: {error.strerror or error}"
        self.note("build", started, reason, well, code)

    def _reference_flags(self) -> list[str]:
        """Flags of axc reference; none where the bundle has one that reaches the end of the context.

        Raises StageFailed.
        """
        started = time.monotonic()
        try:
            return reference_flags(self.bundle, self.model, self.options.model_dir, self.folder / "text.txt")
        except Failure as failure:
            self.note("reference", started, str(failure))
            raise

    def _tokenizer(self) -> Path:
        """Whose ids the board's are compared with: the checkpoint's, or those of a bundle that was handed in."""
        return self.bundle / "hf" if self.options.bundle else fetch(self.spec, self.options.model_dir)

    def _boot_seconds(self) -> float:
        """For a board to answer; the rest of the stage's limit is for switching it on."""
        return min(BOOT_SECONDS, self.options.limit("power on") / 2)

    def _build_flags(self) -> list[str]:
        made_for = chip(self.board, self.model)
        return build_flags(self.model, made_for, self.base, self.folder / built.CHECK, self.options.model_dir)

    def _hil_flags(self) -> list[str]:
        return [
            *(*self.tests, "--lg-env", str(self.board.yaml), "--hil-model", self.model.name),
            *("--hil-deployed", str(self.deployed), "--hil-figures", str(self.folder / "figures.json")),
            *("--hil-probe", str(self.folder / PROBE)),
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
    """What a bundle for a board is built for."""
    return CHIPS.get(board.name, model.spec.build.chip)


def build_flags(model: Variant, made_for: str, out: Path, report: Path, model_dir: Path | None) -> list[str]:
    """Flags of `invoke build` for a night: the bundle comes to `out`, what its check found to `report`."""
    other = [] if made_for == model.spec.build.chip else ["--chip", made_for]
    more = ["--check_report", str(report), *model.flags(), *other]
    where = ["--model-dir", str(model_dir)] if model_dir else []
    return ["--model", model.spec.name, "--out", str(out), "--args", shlex.join(more), *where]


def reference_flags(bundle: Path, model: Variant, model_dir: Path | None, text: Path) -> list[str]:
    """Flags of axc reference; none where the bundle has one that reaches the end of the context. Writes `text`.

    Raises BadInput.
    """
    context = Bundle.open(bundle).kv_cache_len
    if reaches(bundle, context):
        return []
    checkpoint = fetch(model.spec, model_dir)
    text.write_bytes(long_enough(TEXT.read_bytes(), context))
    return ["--input_path", str(checkpoint), "--text", str(text), "--bundle", str(bundle), *sizes(context)]


def sizes(context: int) -> list[str]:
    """Flags of axc reference for a bundle: windows to the end of its context, past each group's history."""
    window = min(context + 1, MOST_WINDOW)
    tokens = max(WINDOWS, -(-POSITIONS // window)) * window
    values = {"window": window, "tokens": tokens, **ACCURACY}
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def long_enough(text: bytes, context: int) -> bytes:
    """The text, again and again where it is too short for the windows of `sizes`."""
    tokens = int(sizes(context)[3])
    return text * -(-tokens * BYTES_A_TOKEN // len(text))


def reaches(bundle: Path, context: int) -> bool:
    """Whether a bundle has reference logits that reach the end of its context. Raises BadInput for damaged ones."""
    if REFERENCE not in read_manifest(bundle)["files"]:
        return False
    return bool(logits.read(bundle / REFERENCE).tokens.shape[1] > min(context, MOST_WINDOW - 1))


def limits(given: Sequence[str]) -> dict[str, float]:
    """`stage=seconds` each."""
    found = {}
    for entry in given:
        name, _, seconds = entry.partition("=")
        if not re.fullmatch(r"\d{1,6}(\.\d+)?", seconds):
            raise BadInput(f"--limit {entry!r}: expected a stage and its seconds: measure=600")
        found[name] = float(seconds)
    return found

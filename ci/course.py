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

from board import logits
from board.bundle import Bundle, read_manifest
from board.errors import BadInput, Failure
from board.logits import NAME as REFERENCE
from ci import evidence, instructions, place, power, stage
from ci.place import Board
from ci.stage import Stage
from toolchain.fetch import fetch
from toolchain.models import ModelSpec

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "models" / "tiny-qwen2" / "heldout.txt"  # what accuracy is measured over, whatever the model
# Flags of axc reference beside --window and --tokens: a window is as long as the context and passes every shape group.
ACCURACY = {"top_k": 1024, "greedy_tokens": 8}
WINDOWS, POSITIONS = 2, 1024  # the fewest of a reference
MOST_WINDOW = 8192  # longer ones take more memory than the machine that computes the reference may have
BYTES_A_TOKEN = 8  # of TEXT, more than any tokenizer makes of it
CHIPS = {"ax630c": "AX620E"}  # boards whose chip is not the one of models/*.toml
MEASURE = "measure"
INSTRUCTIONS = "instructions.json"  # of ci/instructions.py
PROBE = "probe.json"  # of ci/probe.py
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
    "power off": 300.0,
}

BOOT_SECONDS = 180.0

Say = Callable[[str], None]


class Interrupted(BaseException):
    """A signal came while the board was waited for; its argument says so."""


class StageFailed(Exception):
    """The night goes no further than this stage."""


@dataclass(frozen=True)
class Options:
    """`board` and `model` by name; `out` is the folder of reports, `history` the folder of nights that were held.

    `bundle` is one that was built elsewhere, in place of a build; `model_dir` the checkpoint where there is no
    network. `wait` is how many seconds to wait for a board that is held; `limits` override LIMITS.
    """

    board: str
    model: str
    out: Path
    history: Path
    bundle: Path | None = None
    model_dir: Path | None = None
    wait: float = 0.0
    limits: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises BadInput for a limit of no stage."""
        for name, seconds in self.limits.items():
            if name not in LIMITS or not 0 < seconds < 1e6:
                raise BadInput(f"--limit {name}={seconds:g}: expected seconds of a stage: {', '.join(LIMITS)}")

    def limit(self, name: str) -> float:
        return self.limits.get(name, LIMITS[name])


class Course:
    """What happens in a night, and what became of it: `stages`, in their order."""

    def __init__(
        self, options: Options, board: Board, spec: ModelSpec, folder: Path, say: Say, stop: Callable[[], str]
    ) -> None:
        self.options, self.board, self.spec, self.folder = options, board, spec, folder
        self.base = folder.parents[2]  # what build, cross and deploy know as their --out
        self.bundle = self.base / spec.name
        self.deployed = evidence.place(self.base, board.name)
        self.stages: list[Stage] = []
        self.counts = board.emulated and not instructions.unable()
        self.unjudged = False  # the first nights of a maker have no gates
        self._say, self._stop = say, stop

    def reserve(self, last: contextlib.ExitStack) -> None:
        """The board is nobody else's until `last` is closed. Raises StageFailed when it is somebody's."""
        started, reason = time.monotonic(), ""
        try:
            last.enter_context(place.hold(self.board, int(self.options.wait)))
        except (Failure, Interrupted) as failure:
            reason = str(failure)
        self.note("reserve", started, reason, f"{self.board.name} is held by {place.owner()}")

    def note(self, name: str, started: float, reason: str, well: str = "") -> None:
        """A stage that was no command of its own. Raises StageFailed when there is a `reason` to."""
        console = self._console(name)
        console.write_text(f"error: {reason}\n" if reason else f"{well}\n", "utf-8")
        limit = self.options.limit(name) if name in LIMITS else self.options.wait
        self._add(Stage(name, 2 if reason else 0, time.monotonic() - started, limit, reason, console))

    def measure(self) -> None:
        """Everything between holding the board and switching it off. Raises StageFailed."""
        python = [sys.executable, "-m"]
        board, name = str(self.board.yaml), self.spec.name
        if self.board.switch == "port":
            self._run("power on", [*python, "ci.power", "on", board, str(self._boot_seconds())], leaves=True)
        else:
            self._power_by_hand()
        shutil.rmtree(self.bundle, ignore_errors=True)  # a night builds anew, whatever the night before left
        if self.options.bundle is None:
            self._run("build", [*python, "invoke", "build", *self._build_flags()])
        else:
            self._take(self.options.bundle)
        if flags := self._reference_flags():
            self._run("reference", [*python, "toolchain", "reference", *flags])
        self._run("probe", [*python, "ci.probe", str(self._tokenizer()), str(self.folder / PROBE)])
        if self.counts:
            self._run("count", [*python, "ci.instructions", str(self.bundle), str(self.folder / INSTRUCTIONS)])
        where = ["--board", board, "--out", str(self.base)]
        self._run("package", [*python, "invoke", "cross", *where])
        self.deployed.unlink(missing_ok=True)
        self._run("deploy", [*python, "invoke", "deploy", "--model", name, *where])
        with contextlib.suppress(OSError):
            shutil.copyfile(self.deployed, self.folder / DEPLOYED)
        self._run(MEASURE, [*python, "pytest", "tests/hil", *self._hil_flags()])

    def _power_by_hand(self) -> None:
        """Raises StageFailed for a board that does not answer."""
        started, reason, well = time.monotonic(), "", ""
        try:
            well = power.by_hand(self.board, self._say, self._boot_seconds(), self._stop)
        except Failure as failure:
            reason = str(failure)
        self.note("power on", started, reason, well)

    def power_off(self) -> None:
        """Whatever happened before; a signal does not end it. A board that nothing switches stays on."""
        if self.board.switch != "port":
            return
        self._stop = str
        with contextlib.suppress(StageFailed):
            self._run("power off", [sys.executable, "-m", "ci.power", "off", str(self.board.yaml)])

    def _run(self, name: str, command: Sequence[str], *, leaves: bool = False) -> None:
        """Raises StageFailed."""
        self._say(f"{name} ...")
        started, limit = time.monotonic(), self.options.limit(name)
        variables = {**self.board.variables(), place.HELD: str(self.board.state), "PYTHONUNBUFFERED": "1"}
        try:
            done = stage.run(
                name,
                command,
                limit=limit,
                console=self._console(name),
                cwd=ROOT,
                environment=variables,
                leaves=leaves,
                stop=self._stop,
            )
        except Failure as failure:
            self.note(name, started, str(failure))
        else:
            self._add(done)

    def _add(self, done: Stage) -> None:
        """Raises StageFailed for one that failed."""
        self.stages.append(done)
        why = f": {done.reason}" if done.failed else ""
        self._say(f"{done.name} {done.outcome} after {done.seconds:.1f} s{why}")
        if done.failed:
            raise StageFailed

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

    def _reference_flags(self) -> list[str]:
        """Flags of axc reference; none where the bundle has one that reaches the end of the context.

        Raises StageFailed.
        """
        started = time.monotonic()
        try:
            context = Bundle.open(self.bundle).kv_cache_len
            if reaches(self.bundle, context):
                return []
            checkpoint = fetch(self.spec, self.options.model_dir)
        except Failure as failure:
            self.note("reference", started, str(failure))
            raise
        text = self.folder / "text.txt"
        text.write_bytes(long_enough(TEXT.read_bytes(), context))
        return ["--input_path", str(checkpoint), "--text", str(text), "--bundle", str(self.bundle), *sizes(context)]

    def _tokenizer(self) -> Path:
        """Whose ids the board's are compared with: the checkpoint's, or those of a bundle that was handed in."""
        return self.bundle / "hf" if self.options.bundle else fetch(self.spec, self.options.model_dir)

    def _boot_seconds(self) -> float:
        """For a board to answer; the rest of the stage's limit is for switching it on."""
        return min(BOOT_SECONDS, self.options.limit("power on") / 2)

    def _build_flags(self) -> list[str]:
        chip = CHIPS.get(self.board.name)
        more = ["--check_report", str(self.folder / "check.json"), *(["--chip", chip] if chip else [])]
        where = ["--model-dir", str(self.options.model_dir)] if self.options.model_dir else []
        return ["--model", self.spec.name, "--out", str(self.base), "--args", shlex.join(more), *where]

    def _hil_flags(self) -> list[str]:
        return [
            *("--lg-env", str(self.board.yaml), "--hil-model", self.spec.name),
            *("--hil-deployed", str(self.deployed), "--hil-figures", str(self.folder / "figures.json")),
            *("--hil-probe", str(self.folder / PROBE)),
            *(["--hil-unjudged"] if self.unjudged else []),
            *("--hil-limit", str(ON_BOARD * self.options.limit(MEASURE))),
            *("--junitxml", str(self.folder / "junit.xml")),
            *("--benchmark-json", str(self.folder / "benchmark.json")),
            *("-p", "no:cacheprovider", "--tb=short", "-v"),
        ]

    def _console(self, name: str) -> Path:
        return self.folder / f"{name.replace(' ', '-')}.log"


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

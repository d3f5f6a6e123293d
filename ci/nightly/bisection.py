"""Bisection: finds the commit that turned a night red, between the last green night's commit and this one's.

`git bisect` chooses the commits, in a temporary worktree. Each is built there and measured on the same board, only as
far as the red figure, test or stage needs; a commit that does not build is skipped. The last green commit is tested
first: if it is red today too, the code is not the cause.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from axrun.errors import CheckFailed, Failure
from ci.device import holding, strict_json
from ci.device.holding import Holding
from ci.nightly import gate, metrics, retry, stage
from ci.nightly.gate import Gate, Judgement
from ci.nightly.history import Night
from ci.nightly.junit import Case, cases
from ci.nightly.pipeline import BISECT, INSTRUCTIONS, MEASURE, ROOT, Interrupted, Pipeline, Reached, StageFailed
from ci.nightly.stage import Stage

STEPS = 12  # commits to test: enough for a range of 1000 with two that do not build
GIT_SECONDS = 120
SETUP_SECONDS = 1800.0
CODE = ("build", "reference", "probe", "count", "package", "deploy")  # stages that a commit can break
WITHOUT_BOARD = CODE[:-1]
FULL = re.compile(r"\bdisk\b|No space|quota", re.IGNORECASE)
# the file of tests/hil that measures a figure; instruction counts need none
FILES = {**dict.fromkeys(metrics.ACCURACY, "test_accuracy.py"), **dict.fromkeys(metrics.CACHE, "test_cache.py")}
LOCKS = "requirements/*.txt"
KEPT = ("board/engine/build", "board/engine/lib")  # kept from commit to commit: build.py detects changed sources
GOOD, BAD, SKIP = "good", "bad", "skip"
FIRST_BAD = re.compile(r"^([0-9a-f]{40}) is the first bad commit", re.MULTILINE)

Examine = Callable[[str], tuple[str, str]]  # commit -> (GOOD, BAD or SKIP; observation)
Say = Callable[[str], None]


class NotFound(CheckFailed):
    """The bisection found no commit, or does not apply; the message says why."""


@dataclass(frozen=True)
class Target:
    """The red item: a `figure`, a `test` or a `stage`, by name."""

    kind: str
    name: str

    @property
    def last(self) -> str:
        """The last stage to run for it."""
        if self.kind == "stage":
            return self.name
        return "count" if self.counted else MEASURE

    @property
    def counted(self) -> bool:
        return self.kind == "figure" and self.name.startswith(metrics.COUNTED)

    @property
    def needs_board(self) -> bool:
        return self.last not in WITHOUT_BOARD

    @property
    def needs_reference(self) -> bool:
        """Whether it needs the checkpoint's reference logits."""
        return self.name in ("reference", *FILES) or (
            self.kind == "test" and self.name.startswith(("test_what", "test_every"))
        )

    @property
    def tests(self) -> list[str]:
        """The pytest arguments that select it."""
        if self.kind == "figure":
            return [f"tests/hil/{FILES.get(self.name, 'test_speed.py')}"]
        return ["tests/hil", *(["-k", self.name] if self.kind == "test" else [])]


@dataclass(frozen=True)
class Named:
    """The result: `culprit` is empty if none was found, `notes` say why."""

    culprit: str = ""
    notes: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = ()
    seconds: float = 0.0


def run(
    pipeline: Pipeline, night: Night, before: Sequence[Night], judged: Sequence[Judgement], found: Sequence[Case]
) -> Named:
    """Finds the commit that turned a night red, within the time limit `bisect`. Does nothing for a green night."""
    if night.green:
        return Named()
    started = time.monotonic()
    folder = pipeline.folder / BISECT
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        pipeline.say(f"{BISECT}: {line}")

    try:
        target = choose(night, pipeline.stages, judged, found, pipeline.board.name)
        good = last_good(night, before)
        require_path(ROOT, good.commit, night.commit)
        gates = {entry.metric.name: entry.gate for entry in judged if entry.gate}
        folder.mkdir()
        say(f"{target.kind} {target.name}: green at {good.commit[:12]} on {good.started[:10]}")
        limit = started + pipeline.options.limit(BISECT)
        with _held(pipeline, say) as held, _worktree(ROOT, folder / "checkout", held) as tree:
            steps = Steps(pipeline, target, gates, folder, tree, held, limit, say)
            with steps.board():
                culprit = search(tree, good.commit, night.commit, steps.examine, limit, say)
        say(f"the first bad commit is {culprit}")
        note, named = f"red since {culprit}: {len(steps.examined)} commits built and measured", culprit
    except (Failure, Interrupted) as failure:
        note, named = f"not bisected: {failure}".replace("\n", " "), ""
        say(note)
    finally:
        shutil.rmtree(pipeline.bundle, ignore_errors=True) if folder.is_dir() else None
    seconds = time.monotonic() - started
    console = pipeline.folder / f"{BISECT}.log"
    console.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    stages = (Stage(BISECT, 0, seconds, pipeline.options.limit(BISECT), "", console),) if folder.is_dir() else ()
    return Named(named, (note,), stages, seconds)


def choose(
    night: Night, stages: Sequence[Stage], judged: Sequence[Judgement], found: Sequence[Case], board: str
) -> Target:
    """The item to bisect. Raises NotFound if the code is not the cause."""
    failed = next((done for done in stages if done.failed), None)
    if failed is not None and failed.name != MEASURE:
        why = "" if failed.name in CODE else "the board or this machine failed"
        if failed.code in stage.KILLED:
            why = "it was killed, perhaps out of memory"
        elif FULL.search(failed.reason):
            why = "a disk was full"
        elif failed.code == stage.INTERRUPTED:
            why = "the night was interrupted"
        elif failed.name == "deploy" and (failed.code != 1 or retry.cause(failed, [], board)):
            why = "the board failed"
        if why:
            raise NotFound(f"no commit made {failed.name} fail: {why}")
        return Target("stage", failed.name)
    if night.stage != MEASURE or night.reason.startswith("the measured release differs"):
        raise NotFound("the commit's build was not what the board ran")
    messages = [message for case in found for message in case.messages]
    if any(retry.lost(message, board) for message in messages):
        raise NotFound("the board was lost")
    red = [entry for entry in judged if entry.red and entry.value is not None]
    known = tuple(entry.reason() for entry in judged if entry.red) or ("\0",)
    for case in found:
        if any(not message.startswith(known) for message in case.messages):
            return Target("test", case.test)
    if not red:
        raise NotFound("no measured figure is red")
    return Target("figure", min(red, key=lambda entry: metrics.rank(entry.metric.name)).metric.name)


def last_good(night: Night, before: Sequence[Night]) -> Night:
    """The last green night. Raises NotFound if there is none usable, or if a later night already has a culprit."""
    if not night.commit:
        raise NotFound("this is not a git checkout")
    if night.commit.endswith("+"):
        raise NotFound(f"the working tree has changes on top of {night.commit[:12]}: commit them first")
    if night.handed_in:
        raise NotFound("the bundle was built elsewhere, not by a commit of this checkout")
    since: list[Night] = []
    for past in reversed(before):
        if past.judged_green and not past.handed_in and past.commit and past.maker in (night.maker or past.maker, ""):
            break
        since.append(past)
    else:
        raise NotFound("there is no earlier green night")
    if named := next((entry for entry in since if entry.culprit), None):
        raise NotFound(f"red since {named.culprit}, found by the night of {named.started[:10]}")
    if past.commit.endswith("+"):
        raise NotFound(f"the last green night had uncommitted changes on top of {past.commit[:12]}")
    if past.commit == night.commit:
        raise NotFound(f"the last green night ({past.started[:10]}) had the same commit: the code is not the cause")
    return past


def require_path(repository: Path, good: str, bad: str) -> None:
    """Raises NotFound unless `good` is an ancestor of `bad`."""
    done = _git(repository, "merge-base", "--is-ancestor", good, bad, check=False)
    if done.returncode:
        raise NotFound(f"{good[:12]}, the last green, is not an ancestor of {bad[:12]} in this clone")


def search(tree: Path, good: str, bad: str, examine: Examine, limit: float, say: Say) -> str:
    """The first bad commit with its subject, by git bisect in the worktree `tree`.

    Calls `examine` for each commit after checking it out; `limit` is a time.monotonic() deadline. Raises NotFound.
    """
    _git(tree, "checkout", "--quiet", "--detach", good)
    answer, seen = examine(good)
    say(f"{_title(tree, good)}: {answer}: {seen}")
    if answer != GOOD:
        raise NotFound(f"{good[:12]} was green and {'is red' if answer == BAD else 'cannot be measured'} today: {seen}")
    said = _git(tree, "bisect", "start", bad, good).stdout
    for _ in range(STEPS):
        if named := FIRST_BAD.search(said):
            return _title(tree, named[1])
        if time.monotonic() > limit:
            raise NotFound(f"out of time; {_between(tree)}")
        commit = _git(tree, "rev-parse", "HEAD").stdout.strip()
        answer, seen = examine(commit)
        say(f"{_title(tree, commit)}: {answer}: {seen}")
        done = _git(tree, "bisect", answer, check=False)
        said = done.stdout
        if done.returncode:
            raise NotFound(f"the remaining commits cannot be built or measured; {_between(tree)}")
    raise NotFound(f"{STEPS} commits tested; {_between(tree)}")


class Steps:
    """Builds and measures commits one after another, in one worktree and on one board."""

    def __init__(
        self,
        pipeline: Pipeline,
        target: Target,
        gates: Mapping[str, Gate],
        folder: Path,
        tree: Path,
        held: Holding | None,
        limit: float,
        say: Say,
    ) -> None:
        self.examined: list[str] = []
        self._pipeline, self._target, self._gates, self._folder = pipeline, target, gates, folder
        self._tree, self._held, self._limit, self._say = tree, held, limit, say
        self._board = pipeline.board.name

    @contextlib.contextmanager
    def board(self) -> Iterator[None]:
        """Powers the board on if needed, and off afterwards. Raises NotFound if it does not boot."""
        if not self._target.needs_board:
            yield
            return
        switch = self._step(self._folder)
        try:
            switch.power_on()
            yield
        except StageFailed:
            raise NotFound(f"the board does not boot: {switch.stages[-1].reason}") from None
        finally:
            switch.power_off()

    def examine(self, commit: str) -> tuple[str, str]:
        """Builds and measures the commit that is checked out."""
        self.examined.append(commit)
        folder = self._folder / commit[:12]
        folder.mkdir(exist_ok=True)
        _git(self._tree, "clean", "-ffdxq", *(word for path in KEPT for word in ("-e", path)))
        step = self._step(folder)
        try:
            step.python = self._python(folder)
            step.measure_only(self._target.last, board=self._target.needs_board)
        except Reached:
            pass
        except StageFailed:
            if why := self._pipeline.interrupted:
                raise NotFound(why) from None
            failed = step.stages[-1]
            if time.monotonic() > self._limit:
                raise NotFound(f"out of time in {failed.name} of {commit[:12]}") from None
            if (failed.name, "stage") == (self._target.name, self._target.kind):
                if retry.cause(failed, [], self._board) or failed.code in stage.KILLED:
                    return SKIP, failed.reason
                return BAD, failed.reason
            if failed.name != MEASURE:
                return SKIP, f"{failed.name}: {failed.reason}"
        except Failure as failure:
            return SKIP, str(failure).partition("\n")[0]
        if self._target.kind == "stage":
            return GOOD, f"{self._target.name} passed"
        return self.figure(folder) if self._target.kind == "figure" else self.test(folder)

    def figure(self, folder: Path) -> tuple[str, str]:
        """Judges a step's figure by the gate of the night."""
        figures: dict[str, float] = {}
        for name in ("figures.json", INSTRUCTIONS):
            data = strict_json.read_or_nothing(folder / name)
            found = data.get("figures") if name == "figures.json" else data
            figures |= metrics.figures(found)
        name = self._target.name
        if name not in figures:
            return SKIP, f"{name} was not measured"
        (judgement,) = gate.judge({name: figures[name]}, {name: self._gates[name]})
        return BAD if judgement.red else GOOD, judgement.value_text

    def test(self, folder: Path) -> tuple[str, str]:
        """The test's result in a step's junit.xml."""
        mine = [case for case in cases(folder / "junit.xml") if case.test == self._target.name]
        messages = [message for case in mine for message in case.messages]
        if any(retry.lost(message, self._board) for message in messages):
            return SKIP, messages[0].partition("\n")[0]
        if messages:
            return BAD, messages[0].partition("\n")[0]
        return (GOOD, "it passes") if mine and all(case.ran for case in mine) else (SKIP, "the test did not run")

    def _step(self, folder: Path) -> Pipeline:
        """A pipeline for one commit, which shares the night's folder of bundles and packages."""
        night = self._pipeline
        # Each stage has the time limit of the night's; the limit of the bisection interrupts a running step.
        options = replace(night.options, built=None)  # the shared build is of the night's commit
        step = Pipeline(options, night.board, night.model, folder, self._quiet, self._stop, night.base)
        step.root, step.holding = self._tree, self._held
        step.tests, step.counts = self._target.tests, self._target.last == "count"
        step.needs_reference, step.unjudged = self._target.needs_reference, True
        return step

    def _stop(self) -> str:
        late = "the bisection is out of time" if time.monotonic() > self._limit else ""
        return self._pipeline.interrupted or late

    def _quiet(self, line: str) -> None:
        self._pipeline.say(f"{BISECT}:   {line}")

    def _python(self, folder: Path) -> str:
        """This environment's Python if the commit has the same locked requirements, else that of a new environment.

        Raises StageFailed.
        """
        locks = _locks(self._tree)
        if locks == _locks(ROOT):
            return sys.executable
        venv = self._folder / f"venv-{locks[:12]}"
        python = venv / "bin" / "python"
        if not python.exists():
            self._say("other locked requirements: making an environment for this commit")
            command = [sys.executable, "requirements/install.py", str(venv), "build", "reference", "test", "boards"]
            done = stage.run(
                "setup", command, limit=SETUP_SECONDS, console=folder / "setup.log", cwd=self._tree, stop=self._stop
            )
            if done.failed:
                shutil.rmtree(venv, ignore_errors=True)
                raise CheckFailed(f"cannot make its environment: {done.reason}")
        return str(python)


@contextlib.contextmanager
def _held(pipeline: Pipeline, say: Say) -> Iterator[Holding | None]:
    """Reserves the board again. Raises BadInput if somebody else took it in the meantime."""
    what = f"bisection of {pipeline.spec.name}"
    with holding.hold(pipeline.board, what, int(pipeline.options.wait), say) as held:
        yield held


@contextlib.contextmanager
def _worktree(repository: Path, tree: Path, held: Holding | None) -> Iterator[Path]:
    """A temporary worktree."""
    if held:
        held.worktree(tree)
    _git(repository, "worktree", "add", "--quiet", "--detach", str(tree), "HEAD")
    try:
        _seed(repository, tree)
        yield tree
    finally:
        _git(repository, "worktree", "remove", "--force", "--force", str(tree), check=False)
        shutil.rmtree(tree, ignore_errors=True)
        _git(repository, "worktree", "prune", check=False)
        for venv in tree.parent.glob("venv-*"):
            shutil.rmtree(venv, ignore_errors=True)


def _seed(repository: Path, tree: Path) -> None:
    """Copies the engine's build cache, so that a commit compiles only what it changed."""
    for path in KEPT:
        try:
            if (repository / path).is_dir():
                shutil.copytree(repository / path, tree / path, symlinks=True, dirs_exist_ok=True)
        except (OSError, shutil.Error):  # another build is running there
            shutil.rmtree(tree / path, ignore_errors=True)


def _between(tree: Path) -> str:
    """The remaining candidates, in words."""
    goods = _git(tree, "for-each-ref", "--format=%(objectname)", "refs/bisect/good-*").stdout.split()
    bad = _git(tree, "rev-parse", "refs/bisect/bad").stdout.strip()
    left = _git(tree, "rev-list", bad, *(f"^{good}" for good in goods)).stdout.split()
    shown = ", ".join(_title(tree, commit) for commit in left[:3]) + (
        f" and {len(left) - 3} more" if len(left) > 3 else ""
    )
    return f"it is one of {shown}"


def _title(tree: Path, commit: str) -> str:
    """A commit's short id and subject, printable."""
    text = _git(tree, "log", "-1", "--no-color", "--format=%h %s", commit, "--").stdout.strip()
    return "".join(c if c.isprintable() else "�" for c in text)[:120]


def _locks(tree: Path) -> str:
    """A digest of the locked requirements."""
    digest = hashlib.sha256()
    for file in sorted(tree.glob(LOCKS)):
        digest.update(f"{file.relative_to(tree)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def _git(folder: Path, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs git. Raises NotFound with its error."""
    try:
        done = subprocess.run(
            ["git", "-c", "core.hooksPath=/dev/null", *words],
            cwd=folder,
            env={**_environment(), "LC_ALL": "C"},
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=GIT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotFound(f"git {words[0]}: {error}") from None
    if check and done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        raise NotFound(f"git {words[0]}: {(last or ['it printed nothing'])[0][:200]}")
    return done


def _environment() -> dict[str, str]:
    """Our environment without GIT_* variables, with which a git hook would redirect us to another repository."""
    return {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}

"""The commit that made a night red: git bisect between the last green night's commit and this one's.

git chooses the commits, in a checkout of its own that goes away afterwards. Each is built there and measured on the
same board, as far as the red figure, test or stage needs; what does not build is skipped. The last green commit is
examined first: where it is red today as well, the cause is not in the commits.
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
from ci.nightly.course import BISECT, INSTRUCTIONS, MEASURE, ROOT, Course, Interrupted, Reached, StageFailed
from ci.nightly.gate import Gate, Judgement
from ci.nightly.history import Night
from ci.nightly.junit import Case, cases
from ci.nightly.stage import Stage

STEPS = 12  # commits to examine: enough for 1000 between, with two that do not build
GIT_SECONDS = 120
SETUP_SECONDS = 1800.0
CODE = ("build", "reference", "probe", "count", "package", "deploy")  # stages that code makes fail
WITHOUT_BOARD = CODE[:-1]
FULL = re.compile(r"\bdisk\b|No space|quota", re.IGNORECASE)
# the file of tests/hil that measures a figure; those counted on this machine need none
FILES = {**dict.fromkeys(metrics.ACCURACY, "test_accuracy.py"), **dict.fromkeys(metrics.CACHE, "test_cache.py")}
LOCKS = "requirements/*.txt"
KEPT = ("board/engine/build", "board/engine/lib")  # of a checkout from commit to commit: build.py knows its sources
GOOD, BAD, SKIP = "good", "bad", "skip"
FIRST_BAD = re.compile(r"^([0-9a-f]{40}) is the first bad commit", re.MULTILINE)

Examine = Callable[[str], tuple[str, str]]  # commit -> (GOOD, BAD or SKIP; what was seen)
Say = Callable[[str], None]


class NotFound(CheckFailed):
    """No commit can be named; the text says why."""


@dataclass(frozen=True)
class Target:
    """What is red: a `figure`, a `test` or a `stage`, by name."""

    kind: str
    name: str

    @property
    def last(self) -> str:
        """The last stage that shows it."""
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
        """Whether it is measured against the checkpoint's logits."""
        return self.name in ("reference", *FILES) or (
            self.kind == "test" and self.name.startswith(("test_what", "test_every"))
        )

    @property
    def tests(self) -> list[str]:
        """What pytest is asked for."""
        if self.kind == "figure":
            return [f"tests/hil/{FILES.get(self.name, 'test_speed.py')}"]
        return ["tests/hil", *(["-k", self.name] if self.kind == "test" else [])]


@dataclass(frozen=True)
class Named:
    """What came of it: `culprit` is empty where none was found, `notes` say why."""

    culprit: str = ""
    notes: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = ()
    seconds: float = 0.0


def run(
    course: Course, night: Night, before: Sequence[Night], judged: Sequence[Judgement], found: Sequence[Case]
) -> Named:
    """Names the commit of a red night, within the limit `bisect` of its options. A green night has none."""
    if night.green:
        return Named()
    started = time.monotonic()
    folder = course.folder / BISECT
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        course.say(f"{BISECT}: {line}")

    try:
        target = choose(night, course.stages, judged, found, course.board.name)
        good = last_good(night, before)
        require_path(ROOT, good.commit, night.commit)
        gates = {entry.metric.name: entry.gate for entry in judged if entry.gate}
        folder.mkdir()
        say(f"{target.kind} {target.name}: green at {good.commit[:12]} on {good.started[:10]}")
        limit = started + course.options.limit(BISECT)
        with _held(course, say) as held, _worktree(ROOT, folder / "checkout", held) as tree:
            steps = Steps(course, target, gates, folder, tree, held, limit, say)
            with steps.board():
                culprit = search(tree, good.commit, night.commit, steps.examine, limit, say)
        say(f"the first bad commit is {culprit}")
        note, named = f"red since {culprit}: {len(steps.examined)} commits were built and measured", culprit
    except (Failure, Interrupted) as failure:
        note, named = f"not bisected: {failure}".replace("\n", " "), ""
        say(note)
    finally:
        shutil.rmtree(course.bundle, ignore_errors=True) if folder.is_dir() else None
    seconds = time.monotonic() - started
    console = course.folder / f"{BISECT}.log"
    console.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    stages = (Stage(BISECT, 0, seconds, course.options.limit(BISECT), "", console),) if folder.is_dir() else ()
    return Named(named, (note,), stages, seconds)


def choose(
    night: Night, stages: Sequence[Stage], judged: Sequence[Judgement], found: Sequence[Case], board: str
) -> Target:
    """What is to be looked for. Raises NotFound for a red that is not of the code."""
    failed = next((done for done in stages if done.failed), None)
    if failed is not None and failed.name != MEASURE:
        why = "" if failed.name in CODE else "a red of the board or of this machine"
        if failed.code in stage.KILLED:
            why = "it was killed, as for want of memory"
        elif FULL.search(failed.reason):
            why = "a disk was full"
        elif failed.code == stage.INTERRUPTED:
            why = "the night was ended from outside"
        elif failed.name == "deploy" and (failed.code != 1 or retry.cause(failed, [], board)):
            why = "the board did not take it"
        if why:
            raise NotFound(f"{failed.name} is not red by a commit: {why}")
        return Target("stage", failed.name)
    if night.stage != MEASURE or night.reason.startswith("what was measured is not"):
        raise NotFound("what is red is not what the commit built")
    messages = [message for case in found for message in case.messages]
    if any(retry.lost(message, board) for message in messages):
        raise NotFound("the board was lost")
    red = [entry for entry in judged if entry.red and entry.value is not None]
    known = tuple(entry.reason() for entry in judged if entry.red) or ("\0",)
    for case in found:
        if any(not message.startswith(known) for message in case.messages):
            return Target("test", case.test)
    if not red:
        raise NotFound("nothing that was measured is red")
    return Target("figure", min(red, key=lambda entry: metrics.rank(entry.metric.name)).metric.name)


def last_good(night: Night, before: Sequence[Night]) -> Night:
    """The last green night. Raises NotFound where there is none to begin from, or a night since has named a commit."""
    if not night.commit:
        raise NotFound("this is no checkout of git")
    if night.commit.endswith("+"):
        raise NotFound(f"the working tree has changes beside {night.commit[:12]}: commit them first")
    if night.handed_in:
        raise NotFound("the bundle was handed in: no commit of this checkout built it")
    since: list[Night] = []
    for past in reversed(before):
        if past.judged_green and not past.handed_in and past.commit and past.maker in (night.maker or past.maker, ""):
            break
        since.append(past)
    else:
        raise NotFound("there was no green night before")
    if named := next((entry for entry in since if entry.culprit), None):
        raise NotFound(f"red since {named.culprit}, as the night of {named.started[:10]} found")
    if past.commit.endswith("+"):
        raise NotFound(f"the last green night had changes in its working tree beside {past.commit[:12]}")
    if past.commit == night.commit:
        raise NotFound(f"the last green night, of {past.started[:10]}, was of the same commit: it is not the code")
    return past


def require_path(repository: Path, good: str, bad: str) -> None:
    """Raises NotFound where git knows no way from one commit to the other."""
    done = _git(repository, "merge-base", "--is-ancestor", good, bad, check=False)
    if done.returncode:
        raise NotFound(f"{good[:12]}, the last green, is no ancestor of {bad[:12]} in this clone")


def search(tree: Path, good: str, bad: str, examine: Examine, limit: float, say: Say) -> str:
    """The first bad commit with its subject, by git bisect in the checkout `tree`.

    `examine` is called with that commit checked out; `limit` is of time.monotonic(). Raises NotFound.
    """
    _git(tree, "checkout", "--quiet", "--detach", good)
    answer, seen = examine(good)
    say(f"{_title(tree, good)}: {answer}: {seen}")
    if answer != GOOD:
        raise NotFound(f"{good[:12]} was green and is {'red' if answer == BAD else 'not to be measured'} today: {seen}")
    said = _git(tree, "bisect", "start", bad, good).stdout
    for _ in range(STEPS):
        if named := FIRST_BAD.search(said):
            return _title(tree, named[1])
        if time.monotonic() > limit:
            raise NotFound(f"the time for it ended; {_between(tree)}")
        commit = _git(tree, "rev-parse", "HEAD").stdout.strip()
        answer, seen = examine(commit)
        say(f"{_title(tree, commit)}: {answer}: {seen}")
        done = _git(tree, "bisect", answer, check=False)
        said = done.stdout
        if done.returncode:
            raise NotFound(f"commits that cannot be built or measured are in the way; {_between(tree)}")
    raise NotFound(f"{STEPS} commits were examined; {_between(tree)}")


class Steps:
    """Builds and measures commits, one after another, in one checkout and on one board."""

    def __init__(
        self,
        course: Course,
        target: Target,
        gates: Mapping[str, Gate],
        folder: Path,
        tree: Path,
        held: Holding | None,
        limit: float,
        say: Say,
    ) -> None:
        self.examined: list[str] = []
        self._course, self._target, self._gates, self._folder = course, target, gates, folder
        self._tree, self._held, self._limit, self._say = tree, held, limit, say
        self._board = course.board.name

    @contextlib.contextmanager
    def board(self) -> Iterator[None]:
        """Switched on where it is needed, and off again. Raises NotFound when it does not come up."""
        if not self._target.needs_board:
            yield
            return
        switch = self._step(self._folder)
        try:
            switch.power_on()
            yield
        except StageFailed:
            raise NotFound(f"the board does not come up: {switch.stages[-1].reason}") from None
        finally:
            switch.power_off()

    def examine(self, commit: str) -> tuple[str, str]:
        """What the commit in the checkout shows of what is red."""
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
            if why := self._course.interrupted:
                raise NotFound(why) from None
            failed = step.stages[-1]
            if time.monotonic() > self._limit:
                raise NotFound(f"the time for it ended in {failed.name} of {commit[:12]}") from None
            if (failed.name, "stage") == (self._target.name, self._target.kind):
                if retry.cause(failed, [], self._board) or failed.code in stage.KILLED:
                    return SKIP, failed.reason
                return BAD, failed.reason
            if failed.name != MEASURE:
                return SKIP, f"{failed.name}: {failed.reason}"
        except Failure as failure:
            return SKIP, str(failure).partition("\n")[0]
        if self._target.kind == "stage":
            return GOOD, f"{self._target.name} is done"
        return self.figure(folder) if self._target.kind == "figure" else self.test(folder)

    def figure(self, folder: Path) -> tuple[str, str]:
        """What a step's figure says, by the gate that judged the night."""
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
        """What a step's junit.xml says of the test."""
        mine = [case for case in cases(folder / "junit.xml") if case.test == self._target.name]
        messages = [message for case in mine for message in case.messages]
        if any(retry.lost(message, self._board) for message in messages):
            return SKIP, messages[0].partition("\n")[0]
        if messages:
            return BAD, messages[0].partition("\n")[0]
        return (GOOD, "it passes") if mine and all(case.ran for case in mine) else (SKIP, "the test did not run")

    def _step(self, folder: Path) -> Course:
        """A course of its own for one commit, in the same folder of bundles and packages as the night."""
        night = self._course
        # The limits of a night hold for each stage of a step; the limit of all steps ends one that is on its way.
        options = replace(night.options, built=None)  # which is of the night's own commit
        step = Course(options, night.board, night.model, folder, self._quiet, self._stop, night.base)
        step.root, step.holding = self._tree, self._held
        step.tests, step.counts = self._target.tests, self._target.last == "count"
        step.needs_reference, step.unjudged = self._target.needs_reference, True
        return step

    def _stop(self) -> str:
        late = "the time for the bisection ended" if time.monotonic() > self._limit else ""
        return self._course.interrupted or late

    def _quiet(self, line: str) -> None:
        self._course.say(f"{BISECT}:   {line}")

    def _python(self, folder: Path) -> str:
        """This environment's Python where the commit's locks are ours, else one with what its locks say.

        Raises StageFailed.
        """
        locks = _locks(self._tree)
        if locks == _locks(ROOT):
            return sys.executable
        venv = self._folder / f"venv-{locks[:12]}"
        python = venv / "bin" / "python"
        if not python.exists():
            self._say("its locks are others: it gets an environment of its own")
            command = [sys.executable, "requirements/install.py", str(venv), "build", "reference", "test", "boards"]
            done = stage.run(
                "setup", command, limit=SETUP_SECONDS, console=folder / "setup.log", cwd=self._tree, stop=self._stop
            )
            if done.failed:
                shutil.rmtree(venv, ignore_errors=True)
                raise CheckFailed(f"its environment cannot be made: {done.reason}")
        return str(python)


@contextlib.contextmanager
def _held(course: Course, say: Say) -> Iterator[Holding | None]:
    """The board once more. Raises BadInput when somebody else has taken it meanwhile."""
    what = f"bisection of {course.spec.name}"
    with holding.hold(course.board, what, int(course.options.wait), say) as held:
        yield held


@contextlib.contextmanager
def _worktree(repository: Path, tree: Path, held: Holding | None) -> Iterator[Path]:
    """A checkout of its own, gone afterwards."""
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
    """What the compiler of the engine knows already, so that it compiles no more than what a commit changed."""
    for path in KEPT:
        try:
            if (repository / path).is_dir():
                shutil.copytree(repository / path, tree / path, symlinks=True, dirs_exist_ok=True)
        except (OSError, shutil.Error):  # somebody builds there now
            shutil.rmtree(tree / path, ignore_errors=True)


def _between(tree: Path) -> str:
    """The commits that are left."""
    goods = _git(tree, "for-each-ref", "--format=%(objectname)", "refs/bisect/good-*").stdout.split()
    bad = _git(tree, "rev-parse", "refs/bisect/bad").stdout.strip()
    left = _git(tree, "rev-list", bad, *(f"^{good}" for good in goods)).stdout.split()
    shown = ", ".join(_title(tree, commit) for commit in left[:3]) + (
        f" and {len(left) - 3} more" if len(left) > 3 else ""
    )
    return f"it is one of {shown}"


def _title(tree: Path, commit: str) -> str:
    """A commit's short name and subject, as text that shows anywhere."""
    text = _git(tree, "log", "-1", "--no-color", "--format=%h %s", commit, "--").stdout.strip()
    return "".join(c if c.isprintable() else "�" for c in text)[:120]


def _locks(tree: Path) -> str:
    """A digest of what decides the environment."""
    digest = hashlib.sha256()
    for file in sorted(tree.glob(LOCKS)):
        digest.update(f"{file.relative_to(tree)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def _git(folder: Path, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Raises NotFound with what git said."""
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
        raise NotFound(f"git {words[0]}: {(last or ['it said nothing'])[0][:200]}")
    return done


def _environment() -> dict[str, str]:
    """Without the variables by which a git hook names another repository."""
    return {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}

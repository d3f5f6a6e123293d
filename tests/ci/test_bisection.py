"""Bisection in real git repositories: the commit that turned a night red, and failures that are not the code's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from axrun.errors import CheckFailed
from ci.nightly import bisection
from ci.nightly.bisection import BAD, GOOD, SKIP, NotFound, Target
from ci.nightly.history import Night
from ci.nightly.junit import Case
from ci.nightly.pipeline import ROOT
from ci.nightly.stage import INTERRUPTED, Stage
from tests.ci.test_history import night
from tests.ci.test_verdict import GATES, WORSE, held, judged

CHECK = """
import value
raise SystemExit(0 if value.VALUE < 10 else 1)
"""


class Repository:
    """Commits of a file `value.py`, each with a number: from 10 on they are bad; those of None do not build."""

    def __init__(self, folder: Path, *values: int | None) -> None:
        self.folder = folder
        self.git("init", "--quiet", "--initial-branch=main")
        (folder / "check.py").write_text(CHECK)
        self.commits = [self.commit(number, value) for number, value in enumerate(values)]
        self.examined: list[str] = []

    def git(self, *words: str, folder: Path | None = None) -> str:
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        done = subprocess.run(
            ["git", *who, *words], cwd=folder or self.folder, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def commit(self, number: int, value: int | None) -> str:
        (self.folder / "value.py").write_text("VALUE = (" if value is None else f"VALUE = {value}\n")
        (self.folder / "number").write_text(str(number))
        self.git("add", "-A")
        self.git("commit", "--quiet", "-m", f"value: number {number}\x1b[31m")
        return self.git("rev-parse", "HEAD")

    def search(self, tree: Path, limit: float = 300.0, good: int = 0) -> str:
        def examine(commit: str) -> tuple[str, str]:
            self.examined.append(commit)
            assert self.git("rev-parse", "HEAD", folder=tree) == commit
            built = subprocess.run([sys.executable, "-B", "-c", "import value"], cwd=tree, capture_output=True)
            if built.returncode:
                return SKIP, "it does not build"
            done = subprocess.run([sys.executable, "-B", "check.py"], cwd=tree)
            return (BAD if done.returncode else GOOD), f"exit code {done.returncode}"

        self.said: list[str] = []
        with bisection._worktree(self.folder, tree, None):
            end = time.monotonic() + limit
            return bisection.search(tree, self.commits[good], self.commits[-1], examine, end, self.said.append)


@pytest.mark.parametrize(
    ("values", "culprit"),
    [
        ((1, 10), 1),
        ((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13), 9),
        ((1, 2, None, 4, 5, 10, None, 12), 5),
        ((1, 10, None, None, 10), 1),
    ],
)
def test_the_first_bad_commit_is_named(values: tuple[int | None, ...], culprit: int, tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    repository = Repository(tmp_path / "repository", *values)
    tree = tmp_path / "tree"
    short = repository.git("rev-parse", "--short", repository.commits[culprit])
    assert repository.search(tree) == f"{short} value: number {culprit}\ufffd[31m"
    assert repository.examined[0] == repository.commits[0]
    assert len(repository.examined) == len(set(repository.examined)) <= 6
    assert not tree.exists()
    assert len(repository.git("worktree", "list").splitlines()) == 1
    assert repository.git("status", "--porcelain") == ""


def test_commits_that_do_not_build_may_hide_it(tmp_path: Path) -> None:
    repository = Repository(tmp_path, 1, None, None, 10)
    with pytest.raises(NotFound, match="the remaining commits cannot be built or measured; it is one of ") as caught:
        repository.search(tmp_path / "tree")
    assert all(f"value: number {number}" in str(caught.value) for number in (1, 2, 3))


def test_a_green_commit_that_is_red_today_ends_it(tmp_path: Path) -> None:
    """The board changed, or this machine: no commit did."""
    repository = Repository(tmp_path, 10, 10, 10)
    with pytest.raises(NotFound, match="was green and is red today: exit code 1"):
        repository.search(tmp_path / "tree")
    assert len(repository.examined) == 1


def test_it_ends_in_time(tmp_path: Path) -> None:
    repository = Repository(tmp_path, 1, 2, 3, 10)
    with pytest.raises(NotFound, match="out of time; it is one of "):
        repository.search(tmp_path / "tree", limit=0.0)
    assert len(repository.examined) == 1


def test_a_commit_of_another_line_is_refused(tmp_path: Path) -> None:
    repository = Repository(tmp_path, 1, 2)
    first, second = repository.commits
    bisection.require_path(tmp_path, first, second)
    for good in (second, "0" * 40):
        with pytest.raises(NotFound, match="is not an ancestor of"):
            bisection.require_path(tmp_path, good, first)


def test_a_hook_of_the_repository_is_not_run(tmp_path: Path) -> None:
    repository = Repository(tmp_path, 1, 10)
    hook = tmp_path / ".git" / "hooks" / "post-checkout"
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path}/run\n")
    os.chmod(hook, 0o755)
    repository.search(tmp_path / "tree")
    assert not (tmp_path / "run").exists()


A, B = "a" * 40, "b" * 40


def red(**said: object) -> Night:
    return night(9, **{"verdict": "red", "reason": WORSE, "stage": "measure", "commit": B, **said})


@pytest.mark.parametrize(
    ("now", "before", "told"),
    [
        (red(commit=""), [night(1, commit=A)], "this is not a git checkout"),
        (red(commit=f"{B}+"), [night(1, commit=A)], "the working tree has changes on top of bbbbbbbbbbbb: commit"),
        (red(handed_in=True), [night(1, commit=A)], "the bundle was built elsewhere"),
        (red(), [], "there is no earlier green night"),
        (red(), [night(1, commit=A, handed_in=True)], "there is no earlier green night"),
        (red(), [night(1, commit=A, reason="recorded, not judged")], "there is no earlier green night"),
        (red(), [night(1, commit=f"{A}+")], "the last green night had uncommitted changes"),
        (red(), [night(1, commit=B)], "had the same commit: the code is not the cause"),
        (
            red(),
            [night(1, commit=A), red(culprit="abc1234 cli: rename a flag", started="2026-11-02T02:00:00Z")],
            "red since abc1234 cli: rename a flag, found by the night of 2026-11-02",
        ),
    ],
)
def test_a_night_without_a_usable_green_night_is_not_bisected(now: Night, before: list[Night], told: str) -> None:
    with pytest.raises(NotFound) as caught:
        bisection.last_good(now, before)
    assert told in str(caught.value)


def test_bisection_starts_at_the_last_green_night() -> None:
    nights = [night(1, commit=A), night(2, commit=B), red(), red()]
    assert bisection.last_good(red(commit="c" * 40), nights) == nights[1]


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        ([held("power on", 1, "virtual does not answer")], "the board or this machine failed"),
        ([held("build", -9, "killed")], "it was killed, perhaps out of memory"),
        ([held("build", 1, "cannot write: No space left on device")], "a disk was full"),
        ([held("build", INTERRUPTED, "SIGTERM ended the night")], "the night was interrupted"),
        ([held("deploy", 1, "virtual was lost during verify: reset")], "the board failed"),
        ([held("deploy", 2, "virtual has no rsync")], "the board failed"),
    ],
)
def test_a_failure_of_board_or_machine_is_not_bisected(stages: list[Stage], told: str) -> None:
    with pytest.raises(NotFound, match=f"no commit made .* fail: {told}"):
        bisection.choose(red(stage=stages[0].name), stages, [], [], "virtual")


def test_the_target_of_a_bisection() -> None:
    failed = [held("build"), held("measure", 1, "1 failed")]
    mine = Case("test_what_is_left", False, (WORSE,))
    assert bisection.choose(red(), failed, judged(mean_kld=0.01), [mine], "virtual") == Target("figure", "mean_kld")
    other = Case("test_texts", False, ("other ids",))
    assert bisection.choose(red(), failed, judged(), [other], "virtual") == Target("test", "test_texts")
    broken = [held("build", 1, "SyntaxError")]
    assert bisection.choose(red(stage="build"), broken, [], [], "virtual") == Target("stage", "build")
    for case, reason in (
        (Case("test_speed", False, ("virtual hangs: no answer to axrun bench in 40 s",)), "virtual hangs"),
        (mine, "the measured release differs from the deployed one: x"),
    ):
        with pytest.raises(NotFound):
            bisection.choose(red(reason=reason), failed, judged(mean_kld=0.01), [case], "virtual")


def test_it_goes_no_further_than_it_must() -> None:
    assert (Target("stage", "build").last, Target("stage", "build").needs_board) == ("build", False)
    assert (Target("figure", "engine_instructions").last, Target("figure", "engine_instructions").needs_board) == (
        "count",
        False,
    )
    accuracy, speed = Target("figure", "mean_kld"), Target("figure", "decode_128")
    assert (accuracy.last, accuracy.tests, accuracy.needs_reference) == (
        "measure",
        ["tests/hil/test_accuracy.py"],
        True,
    )
    assert (speed.tests, speed.needs_reference) == (["tests/hil/test_speed.py"], False)
    hil = Path(__file__).resolve().parents[1] / "hil"
    assert all((hil / name).is_file() for name in {*bisection.FILES.values(), "test_speed.py"})


class Answers(bisection.Steps):
    """What is read of the files that a step left."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._gates = {"mean_kld": GATES["mean_kld"]}
        self._board = "virtual"
        self.said: list[str] = []
        self._say = self.said.append

    def python(self, folder: Path) -> str:
        self._folder, self._tree = folder, folder / "tree"
        return self._python(folder)

    def _stop(self) -> str:
        return ""


def test_a_step_is_judged_by_the_gate_of_the_night(tmp_path: Path) -> None:
    steps = Answers(Target("figure", "mean_kld"))
    assert steps.figure(tmp_path) == (SKIP, "mean_kld was not measured")
    for value, answer in ((1e-5, GOOD), (0.01, BAD)):
        (tmp_path / "figures.json").write_text(json.dumps({"figures": {"mean_kld": value}}))
        assert steps.figure(tmp_path)[0] == answer


@pytest.mark.parametrize(
    ("inside", "answer"),
    [
        ("", (GOOD, "it passes")),
        ('<failure message="other ids&#10;more"/>', (BAD, "other ids")),
        ('<failure message="virtual hangs: no answer to axrun eval in 40 s"/>', (SKIP, None)),
        ("<skipped/>", (SKIP, "the test did not run")),
    ],
)
def test_a_step_is_judged_by_the_test_that_failed(inside: str, answer: tuple[str, str | None], tmp_path: Path) -> None:
    steps = Answers(Target("test", "test_texts"))
    assert steps.test(tmp_path) == (SKIP, "the test did not run")
    case = f'<testsuite><testcase name="test_texts[a]">{inside}</testcase></testsuite>'
    (tmp_path / "junit.xml").write_text(case)
    assert steps.test(tmp_path)[0] == answer[0]
    assert answer[1] is None or steps.test(tmp_path)[1] == answer[1]


def test_a_commit_with_other_locks_gets_an_environment_of_its_own(tmp_path: Path) -> None:
    locks = tmp_path / "tree" / "requirements"
    shutil.copytree(ROOT / "requirements", locks, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    steps = Answers(Target("stage", "build"))
    assert steps.python(tmp_path) == sys.executable
    (locks / "build.txt").write_text("numpy==0\n")
    (locks / "install.py").write_text("raise SystemExit('error: numpy 0 is nowhere')")
    with pytest.raises(CheckFailed, match="cannot make its environment: numpy 0 is nowhere"):
        steps.python(tmp_path)
    install = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'venv', '--without-pip', sys.argv[1]])"
    (locks / "install.py").write_text(install)
    own = steps.python(tmp_path)
    assert Path(own).parents[2] == tmp_path
    assert subprocess.run([own, "-c", "import sys; print(sys.prefix)"], capture_output=True, check=True).stdout
    assert steps.said == ["other locked requirements: making an environment for this commit"] * 2
    assert steps.python(tmp_path) == own  # kept for the next commit with the same locks
    assert len(steps.said) == 2

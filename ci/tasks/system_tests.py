"""Runs the system tests in independent groups, two at a time, the longest first.

A group is one pytest process: its tests share an emulated board, or a Docker daemon and an image. Artifacts for all
groups, such as the board package, are in a folder of the run (tests/shared.py). Failed tests are retried alone, once.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from invoke.exceptions import Exit

from ci.device.progress import took
from ci.tasks.common import FAILED_TESTS, NO_TESTS, ROOT, command

FOLDERS = ("tests/nightly", "tests/container", "tests/deploy", "tests/engine")  # all other tests form one more group
AT_ONCE = 2
POLL, GRACE = 0.2, 60.0  # seconds


@dataclass(frozen=True)
class Group:
    """`folder` is empty for the tests outside FOLDERS; `memory` is pytest's cache folder, for --last-failed."""

    folder: str
    memory: Path

    @property
    def title(self) -> str:
        return f"system tests of {self.folder}" if self.folder else "the other system tests"

    @property
    def log(self) -> Path:
        return self.memory.with_suffix(".log")

    def start(self, *more: str, shown: bool = False) -> subprocess.Popen[bytes]:
        """Starts pytest; its output goes to this terminal if `shown`, else to the log."""
        words = [self.folder] if self.folder else [f"--deselect={folder}/" for folder in FOLDERS]
        argv, environment = command("pytest", "-m", "system", "-o", f"cache_dir={self.memory}", *words, *more)
        environment["AXC_TEST_RUN"] = str(self.memory.parent)
        with contextlib.nullcontext() if shown else self.log.open("wb") as file:
            errors = None if file is None else subprocess.STDOUT
            return subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=file, stderr=errors)


def run(*more: str) -> None:
    """Raises Exit with pytest's code if a test fails twice. With flags in `more`, a group may have no test."""
    fine = (0, NO_TESTS) if more else (0,)
    with tempfile.TemporaryDirectory() as folder:
        groups = [Group(name, Path(folder) / f"group{number}") for number, name in enumerate((*FOLDERS, ""))]
        codes = {}
        for group, code in _ended(groups, *more):
            codes[group] = code
            print(group.log.read_text(errors="replace"), flush=True)
        if all(code == NO_TESTS for code in codes.values()):
            return
        for group, code in codes.items():
            if code == FAILED_TESTS:
                print(f"error: {group.title} failed. Retrying the failed ones alone, in case they", flush=True)
                print("timed out under load.", flush=True)
                code = group.start("--last-failed", "--last-failed-no-failures=none", *more, shown=True).wait()
            if code not in fine:
                raise Exit(code=code)


def _ended(groups: list[Group], *more: str) -> Iterator[tuple[Group, int]]:
    """Yields each group and its exit code as it ends."""
    waiting, running = list(groups), dict[Group, tuple[float, subprocess.Popen[bytes]]]()
    try:
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                group = waiting.pop(0)
                print(f"{group.title} ...", flush=True)
                running[group] = (time.monotonic(), group.start(*more))
            for group, (started, process) in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[group]
                    print(f"\n{group.title}{took(started)}:", flush=True)
                    yield group, code
            time.sleep(POLL)
    finally:
        for _, process in running.values():  # so that they release their boards and daemons
            process.send_signal(signal.SIGINT)
        for _, process in running.values():
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

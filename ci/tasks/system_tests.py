"""The system tests in two halves at once: those of the container, with a Docker daemon of their own, and the others.

The others share one emulated board and follow one another. What failed is tried once more, alone.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import IO

from invoke.exceptions import Exit

from ci.tasks.common import FAILED_TESTS, NO_TESTS, ROOT, command

CONTAINER = "tests/container"


def run(*more: str) -> None:
    """Raises Exit with pytest's code when a test fails twice. With flags in `more`, a half may have no test."""
    fine = (0, NO_TESTS) if more else (0,)
    with tempfile.TemporaryDirectory() as folder:
        beside, here = Path(folder) / "container", Path(folder) / "others"  # pytest's memory of what failed
        words = {beside: (CONTAINER,), here: (f"--deselect={CONTAINER}/",)}
        log = beside.with_suffix(".log")
        with log.open("wb") as file:
            process = _start(beside, *words[beside], *more, into=file)
            try:
                codes = {here: _start(here, *words[here], *more).wait(), beside: process.wait()}
            finally:
                process.kill()  # when the other half raised; one that has ended stays as it is
                process.wait()
        print(f"\nthe tests of {CONTAINER}, which ran beside them:\n{log.read_text(errors='replace')}", flush=True)
        if codes == dict.fromkeys(codes, NO_TESTS):
            return
        for path, code in codes.items():
            if code == FAILED_TESTS:
                print(
                    "error: system tests failed. Once more, those alone: what was late under load may pass.", flush=True
                )
                code = _start(path, *words[path], "--last-failed", "--last-failed-no-failures=none", *more).wait()
            if code not in fine:
                raise Exit(code=code)


def _start(memory: Path, *words: str, into: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    argv, environment = command("pytest", "-m", "system", "-o", f"cache_dir={memory}", *words)
    errors = None if into is None else subprocess.STDOUT
    return subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=into, stderr=errors)

"""Runs the `axc` command for tests: exit code, stdout, stderr, and files on disk.

It runs in this process, which is faster, unless a test needs a separate one: for an environment, a working directory,
limits or workers.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axc import cli

ROOT = Path(__file__).resolve().parents[2]
BAD_INPUT, CHECK_FAILED, INTERRUPTED = 2, 1, 130


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "axc", *(os.fspath(a) if isinstance(a, Path) else str(a) for a in arguments)]


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of this process, with the checkout importable from any working directory."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "toolchain"), str(ROOT / "board")]),
        **(changes or {}),
    }


def axc(
    *arguments: object,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    limits: Mapping[int, int] | None = None,
    stdout: Any = subprocess.PIPE,
) -> Ended:
    """Runs `axc`; `limits` are resource limits of its process and children, as set by `ulimit`."""
    words, alone = command(*arguments), (cwd, env, limits, stdout) == (ROOT, None, None, subprocess.PIPE)
    if alone and ("--parallel" not in words or words[words.index("--parallel") + 1] == "1"):
        return in_this_process(*words[3:])

    def limit() -> None:
        for what, most in (limits or {}).items():
            resource.setrlimit(what, (most, most))

    ran = subprocess.run(
        words,
        cwd=cwd,
        env=environment(env),
        stdout=stdout,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        timeout=600,
        check=False,
        preexec_fn=limit,
    )
    return Ended(ran.returncode, ran.stdout or "", ran.stderr)


def in_this_process(*words: str) -> Ended:
    """Runs `axc` in this process. Captures stdout and stderr at the level of file descriptors; shows warnings."""
    before = sys.stdout, sys.stderr
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, warnings.catch_warnings():
        warnings.simplefilter("default")
        for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)
        warnings.showwarning = lambda message, *_: print(message, file=sys.stderr)
        kept = [(number, os.dup(number)) for number in (1, 2)]
        try:
            for number, file in ((1, out), (2, err)):
                before[number - 1].flush()
                os.dup2(file.fileno(), number)
            # never closed: modules loaded meanwhile may have kept references to these streams
            sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
            try:
                code: Any = cli.main(list(words))
            except SystemExit as ended:
                code = ended.code
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            for number, copy in kept:
                os.dup2(copy, number)
                os.close(copy)
            sys.stdout, sys.stderr = before
            for number, handler in handlers.items():
                signal.signal(number, handler)
        for file in (out, err):
            file.seek(0)
        return Ended(code, *(file.read().decode("utf-8", "replace") for file in (out, err)))


def llm_build(checkpoint: Path, output: Path | str, *flags: object, **how: Any) -> Ended:
    """`axc llm_build` without its check."""
    paths = ("--input_path", checkpoint, "--output_path", output)
    return axc("llm_build", *paths, "--check_level", "-1", *flags, **how)


def assert_done(ended: Ended) -> None:
    """It succeeded without warnings."""
    assert (ended.code, ended.err) == (0, ""), ended


def assert_refused(ended: Ended, *words: str, code: int = BAD_INPUT) -> None:
    """It failed with one error of one to three lines that contains all the words, and nothing else on stderr."""
    assert "Traceback" not in ended.err, ended.err
    assert ended.code == code, ended
    assert ended.err.startswith("error: "), ended.err
    assert 1 <= len(ended.err.splitlines()) <= 3, ended.err
    for word in words:
        assert word in ended.err


def tree(folder: Path) -> dict[str, Any]:
    """All entries below a folder: type, inode, time and content."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        about = path.lstat()
        if path.is_symlink():
            found[str(path.relative_to(folder))] = ("link", os.readlink(path))
        elif path.is_dir():
            found[str(path.relative_to(folder))] = "folder"
        else:
            found[str(path.relative_to(folder))] = (about.st_ino, about.st_mtime_ns, path.read_bytes())
    return found


@contextlib.contextmanager
def nothing_changes(folder: Path) -> Iterator[None]:
    """Checks that nothing below `folder` changes during the block, including inodes."""
    before = tree(folder)
    yield
    after = tree(folder)
    assert sorted(after) == sorted(before)
    assert [name for name in before if after[name] != before[name]] == []


def assert_same_files(one: Path, other: Path, *ignoring: str) -> None:
    """The folders are equal, as by `diff -r`."""
    excluded = [f"--exclude={name}" for name in ignoring]
    ran = subprocess.run(["diff", "-r", *excluded, one, other], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def assert_build_refused(checkpoint: Path, folder: Path, *words: str, flags: Iterable[object] = (), **how: Any) -> None:
    """A build of `checkpoint` is refused with these words, and nothing below the output `folder` changes."""
    with nothing_changes(folder):
        assert_refused(llm_build(checkpoint, folder / "new" / "parents" / "bundle", *flags, **how), *words)

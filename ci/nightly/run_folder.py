"""The output folder of a night or a matrix run. Old ones are removed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from axrun.errors import BadInput

LOCK = "lock"
NAME = re.compile(r"\d{8}T\d{6}Z(-\d+)?")  # start time, and a number if several started in that second


@contextlib.contextmanager
def claimed(base: Path) -> Iterator[None]:
    """Locks a folder of bundles and packages for one night. Raises BadInput naming the process that uses it."""
    try:
        base.mkdir(parents=True, exist_ok=True)
        lock = (base / LOCK).open("a+")
    except OSError as error:
        raise BadInput(f"cannot write in {base}: {error.strerror or error}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            who = "".join(c for c in lock.read(100) if c.isprintable()) or "another night"
            raise BadInput(
                f"{base} is in use by {who}: two nights in one folder would mix their bundles\n"
                "Wait for it, or give this night another folder: --out DIR"
            ) from None
        lock.truncate(0)
        lock.write(f"a night (pid {os.getpid()})")
        lock.flush()
        yield


def new(runs: Path, started: str, kept: int) -> Path:
    """Makes a folder in `runs` named after `started` (2026-11-03T02:00:00Z), and keeps the newest `kept` folders.

    Raises BadInput if it cannot be made.
    """
    try:
        runs.mkdir(parents=True, exist_ok=True)
        old = sorted(path for path in runs.iterdir() if NAME.fullmatch(path.name))
        for gone in old[: max(0, len(old) - kept + 1)]:
            shutil.rmtree(gone, ignore_errors=True)
        name = re.sub("[-:]", "", started)
        for folder in (runs / name, *(runs / f"{name}-{number}" for number in range(2, 100))):
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder.resolve()
    except OSError as error:
        raise BadInput(f"cannot make a folder in {runs}: {error.strerror or error}") from None
    raise BadInput(f"{runs} already has a hundred runs of this second")

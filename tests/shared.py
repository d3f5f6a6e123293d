"""What a whole run of tests makes once: the processes of `make test-all` find it in a folder that RUN names.

Where RUN is not set, a process is a run of its own. Who needs to change what was made gets a copy.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from ci.device import wheelhouse
from ci.device.listing import Listing
from ci.device.wheelhouse import Package

RUN = "AXC_TEST_RUN"  # of ci/tasks/system_tests.py


def folder() -> Path:
    """The folder of this run, which goes away with it."""
    if RUN not in os.environ:
        made = os.environ[RUN] = tempfile.mkdtemp(prefix="axc-test-run-")
        atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(os.environ[RUN])


def board_package(python: str) -> Package:
    """The board package that `invoke cross` makes, from nothing; to be read only."""
    whole = folder() / f"board-package-{python}.whole"
    with whole.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not whole.exists():
            wheelhouse.cross(python, folder())
            whole.touch()
    at = folder() / "board-package" / f"aarch64-cp{python.replace('.', '')}"
    return Package(at, python, Listing.of(at / "site"))


def copy_board_package(python: str, out: Path) -> None:
    """Puts the package where `invoke cross` has it, which then makes the runner's wheel anew and finds the rest."""
    made = board_package(python)
    shutil.copytree(made.folder, out / made.folder.relative_to(folder()))

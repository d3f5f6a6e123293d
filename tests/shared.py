"""Artifacts built once per test run. The processes of `make test-all` share them in the folder in $AXC_TEST_RUN.

If the variable is not set, each process has its own. Tests that modify an artifact work on a copy.
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

RUN = "AXC_TEST_RUN"  # set by ci/tasks/system_tests.py


def folder() -> Path:
    """The folder of this run, deleted at its end."""
    if RUN not in os.environ:
        made = os.environ[RUN] = tempfile.mkdtemp(prefix="axc-test-run-")
        atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(os.environ[RUN])


def board_package(python: str) -> Package:
    """The board package of `invoke cross`, built from scratch; read-only."""
    whole = folder() / f"board-package-{python}.whole"
    with whole.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not whole.exists():
            wheelhouse.cross(python, folder())
            whole.touch()
    at = folder() / "board-package" / f"aarch64-cp{python.replace('.', '')}"
    return Package(at, python, Listing.of(at / "site"))


def copy_board_package(python: str, out: Path) -> None:
    """Copies the package to where `invoke cross` puts it, which then rebuilds only the runner's wheel."""
    made = board_package(python)
    shutil.copytree(made.folder, out / made.folder.relative_to(folder()))

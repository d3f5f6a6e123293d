"""The board package: the runner's wheel, its dependencies' aarch64 wheels, and the folder they install to.

    out/board-package/aarch64-cp311/
        wheels/            an offline wheelhouse: pip install --no-index --find-links wheels --require-hashes -r ...
        requirements.txt   every wheel by name and hash
        site/              the same wheels, installed; what a board gets, so that it needs neither pip nor venv
        SHA256SUMS         of site/, as sha256sum writes it

The same checkout gives the same bytes on any machine that can have the page's Markdown libraries
(requirements/page.py). Without them the package is another one, named by its own digest; building it says so.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from axrun.errors import BadInput, CheckFailed
from axrun.format.bundle import sha256
from ci.device.listing import Listing
from ci.device.progress import Say, took, watched
from requirements.install import SetupFailed
from requirements.page import bring

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ("3.9", "3.10", "3.11")  # what boards carry; each has its lock, requirements/board-<version>.txt
# Wheels may ask for a glibc as new as 2.31, which is Debian 11's and Ubuntu 20.04's. https://peps.python.org/pep-0600/
PLATFORMS = ("manylinux2014_aarch64", *(f"manylinux_2_{minor}_aarch64" for minor in range(17, 32)))
EPOCH = "315532800"  # 1980-01-01, the oldest time a zip archive can hold
INSTALL_SECONDS, DOWNLOAD_SECONDS = 1800, 1800

LAUNCHER = """#!/bin/sh
# The runner of this release: axrun run model --prompt '1+1='
# Python takes modules from the folder above and its library only (-I -S: no PYTHONPATH, no site-packages), and keeps
# its compiled files beside the folder, which so holds what was deployed and nothing else.
here=$(dirname "$(dirname "$(readlink -f "$0")")")
exec python3 -I -S -X utf8 -X pycache_prefix="$here.compiled" -c '
import runpy, sys
sys.path.insert(0, sys.argv.pop(1))
runpy.run_module("axrun", run_name="__main__", alter_sys=True)' "$here" "$@"
"""


@dataclass(frozen=True)
class Package:
    """A board package on disk; `listing` is what `site` holds."""

    folder: Path
    python: str
    listing: Listing

    @property
    def wheels(self) -> Path:
        return self.folder / "wheels"

    @property
    def site(self) -> Path:
        return self.folder / "site"


def cross(python: str, out: Path, say: Say = lambda line: None) -> Package:
    """Builds the package for boards with Python `python` ("3.11") under `out`, or takes what is there and current.

    Raises BadInput for a Python without a lock, CheckFailed when a tool failed.
    """
    if python not in PYTHONS:
        raise BadInput(f"no board package for Python {python}: there are locks for {', '.join(PYTHONS)}")
    folder = out / "board-package" / f"aarch64-cp{python.replace('.', '')}"
    wheels = folder / "wheels"
    lock = ROOT / "requirements" / f"board-{python}.txt"
    _download(lock, python, wheels, say)
    try:
        bring(Path(sys.prefix))
    except SetupFailed as error:  # the page has a way without them; a board must not wait for npm's registry
        print(f"note: {error}\nUntil then the page of `axrun serve` on the board shows plain text.", file=sys.stderr)
    _build(wheels, say)
    _name_by_hash(wheels, folder / "requirements.txt")
    site, stamp = folder / "site", folder / "site.made-from"
    made_from = hashlib.sha256(b"".join(sorted(sha256(path).encode() for path in wheels.iterdir()))).hexdigest()
    if not (stamp.is_file() and stamp.read_text() == made_from and site.is_dir()):
        stamp.unlink(missing_ok=True)
        _install(wheels, python, site, say)
        stamp.write_text(made_from)
    listing = Listing.of(site)
    (folder / "SHA256SUMS").write_text(listing.text)
    return Package(folder, python, listing)


def _download(lock: Path, python: str, wheels: Path, say: Say) -> None:
    """The wheels a lock names, unless the folder has been filled from this very lock."""
    stamp, wanted = wheels.parent / "wheels.made-from", sha256(lock)
    if stamp.is_file() and stamp.read_text() == wanted and wheels.is_dir():
        return
    fresh = wheels.with_name("wheels.part")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    local = os.environ.get("WHEELS")
    started = time.monotonic()
    say(f"package: the wheels of {lock.name}, by hash ...")
    _run(
        [
            *(sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-input", "--no-deps"),
            *("--require-hashes", "--only-binary=:all:", *_target(python), "-r", str(lock), "-d", str(fresh)),
            *([f"--find-links={Path(local).expanduser().resolve()}"] if local else []),
        ],
        "the board's wheels did not come",
        DOWNLOAD_SECONDS,
        say,
    )
    say(f"package: {len(list(fresh.iterdir()))} wheels{took(started)}")
    shutil.rmtree(wheels, ignore_errors=True)
    fresh.rename(wheels)
    stamp.write_text(wanted)


def _build(wheels: Path, say: Say) -> None:
    """The runner's own wheel, in place of any older one."""
    fresh = wheels.with_name("own.part")
    shutil.rmtree(fresh, ignore_errors=True)
    started = time.monotonic()
    say("package: the runner's wheel; its engine is compiled for aarch64 where that has changed, in about a minute ...")
    _run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(fresh.resolve())],
        "the runner's wheel could not be built",
        INSTALL_SECONDS,
        say,
        cwd=ROOT / "board",
    )
    (made,) = fresh.glob("*.whl")
    for old in wheels.glob("axrun-*.whl"):
        old.unlink()
    own = made.replace(wheels / made.name)
    fresh.rmdir()
    say(f"package: {own.name}{took(started)}")


def _install(wheels: Path, python: str, site: Path, say: Say) -> None:
    """Unpacks every wheel for the board, on this machine; nothing of this machine gets into the folder."""
    fresh, started = site.with_name("site.part"), time.monotonic()
    shutil.rmtree(fresh, ignore_errors=True)
    _run(
        [
            *(sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-input", "--no-deps"),
            *("--no-index", "--no-compile", "--only-binary=:all:", *_target(python), "--target", str(fresh)),
            *(str(path) for path in sorted(wheels.iterdir())),
        ],
        "the board's wheels could not be installed",
        INSTALL_SECONDS,
        say,
    )
    say(f"package: unpacked into {site}{took(started)}")
    shutil.rmtree(fresh / "bin", ignore_errors=True)  # scripts with this machine's Python in their first line
    for record in fresh.glob("*.dist-info/*"):
        if record.name in ("direct_url.json", "RECORD", "REQUESTED", "INSTALLER"):
            record.unlink()  # where each wheel lay, and what else pip notes for itself
    launcher = fresh / "bin" / "axrun"
    launcher.parent.mkdir()
    launcher.write_text(LAUNCHER)
    launcher.chmod(0o755)
    shutil.rmtree(site, ignore_errors=True)
    fresh.rename(site)


def _name_by_hash(wheels: Path, path: Path) -> None:
    """requirements.txt of the wheelhouse. A wheel's file name begins with its project's name and version."""
    lines = []
    for wheel in sorted(wheels.glob("*.whl")):
        found = re.match(r"([A-Za-z0-9_.]+)-([^-]+)-", wheel.name)
        if found is None:
            raise CheckFailed(f"{wheel} is not named as a wheel is")
        lines.append(f"{found[1].replace('_', '-')}=={found[2]} --hash=sha256:{sha256(wheel)}\n")
    path.write_text("".join(lines))


def _target(python: str) -> list[str]:
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    return [*platforms, "--python-version", python, "--implementation", "cp"]


def _run(command: Sequence[str], on_failure: str, seconds: int, say: Say, cwd: Path = ROOT) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("PIP_TARGET", "PIP_USER", "PYTHONPATH")}
    try:
        done = watched(
            command,
            f"  {command[2]}",
            say,
            seconds=seconds,
            cwd=cwd,
            environment={**kept, "SOURCE_DATE_EPOCH": EPOCH, "AXRUN_TARGET": "aarch64"},
        )
    except subprocess.TimeoutExpired:
        raise CheckFailed(f"{on_failure}: {command[2]} was not done after {seconds} s") from None
    if done.returncode:
        said = [line.strip() for line in done.stdout.splitlines() if line.strip()] or ["it said nothing"]
        errors = [line for line in said if line.lower().startswith("error")]
        raise CheckFailed(f"{on_failure}: {(errors or said)[-1][:300]}\nWith its cause mended, run the same again.")

"""The board package: the runner's wheel, its dependencies' aarch64 wheels, and the folder they install to.

    out/board-package/aarch64-cp311/
        wheels/            an offline wheelhouse: pip install --no-index --find-links wheels --require-hashes -r ...
        requirements.txt   every wheel by name and hash
        site/              the same wheels, installed; a board gets this folder and needs neither pip nor venv
        SHA256SUMS         of site/, in sha256sum's format

The same checkout gives the same bytes on any machine, provided that the page's Markdown libraries are available
(requirements/page.py). Without them the package has another digest; the build prints a note.
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
PYTHONS = ("3.9", "3.10", "3.11")  # versions on boards; each has a lock file, requirements/board-<version>.txt
# Wheels may need glibc up to 2.31, the version of Debian 11 and Ubuntu 20.04. https://peps.python.org/pep-0600/
PLATFORMS = ("manylinux2014_aarch64", *(f"manylinux_2_{minor}_aarch64" for minor in range(17, 32)))
EPOCH = "315532800"  # 1980-01-01, the oldest time a zip archive can hold
INSTALL_SECONDS, DOWNLOAD_SECONDS = 1800, 1800

LAUNCHER = """#!/bin/sh
# The runner of this release: axrun run model --prompt '1+1='
# Python imports only from the package folder and its standard library (-I -S: no PYTHONPATH, no site-packages). Its
# bytecode goes to a separate folder, so that the package folder holds exactly the deployed files.
here=$(dirname "$(dirname "$(readlink -f "$0")")")
exec python3 -I -S -X utf8 -X pycache_prefix="$here.compiled" -c '
import runpy, sys
sys.path.insert(0, sys.argv.pop(1))
runpy.run_module("axrun", run_name="__main__", alter_sys=True)' "$here" "$@"
"""


@dataclass(frozen=True)
class Package:
    """A board package on disk; `listing` has the files of `site`."""

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
    """Builds the package for boards with Python `python` ("3.11") under `out`, reusing parts that are up to date.

    Raises BadInput for a Python without a lock file, CheckFailed if a tool fails.
    """
    if python not in PYTHONS:
        raise BadInput(f"no board package for Python {python}: there are locks for {', '.join(PYTHONS)}")
    folder = out / "board-package" / f"aarch64-cp{python.replace('.', '')}"
    wheels = folder / "wheels"
    lock = ROOT / "requirements" / f"board-{python}.txt"
    _download(lock, python, wheels, say)
    try:
        bring(Path(sys.prefix))
    except SetupFailed as error:  # the page works without them; a deploy must not depend on npm's registry
        print(f"note: {error}\nWithout them the page of `axrun serve` on the board shows plain text.", file=sys.stderr)
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
    """Downloads the wheels of a lock file, unless the folder was already filled from this lock."""
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
        "cannot download the board's wheels",
        DOWNLOAD_SECONDS,
        say,
    )
    say(f"package: {len(list(fresh.iterdir()))} wheels{took(started)}")
    shutil.rmtree(wheels, ignore_errors=True)
    fresh.rename(wheels)
    stamp.write_text(wanted)


def _build(wheels: Path, say: Say) -> None:
    """Builds the runner's wheel, replacing an older one."""
    fresh = wheels.with_name("own.part")
    shutil.rmtree(fresh, ignore_errors=True)
    started = time.monotonic()
    say("package: the runner's wheel (compiles the engine for aarch64 if it changed, about a minute) ...")
    _run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(fresh.resolve())],
        "cannot build the runner's wheel",
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
    """Installs every wheel for the board into `site`, without traces of this machine."""
    fresh, started = site.with_name("site.part"), time.monotonic()
    shutil.rmtree(fresh, ignore_errors=True)
    _run(
        [
            *(sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-input", "--no-deps"),
            *("--no-index", "--no-compile", "--only-binary=:all:", *_target(python), "--target", str(fresh)),
            *(str(path) for path in sorted(wheels.iterdir())),
        ],
        "cannot install the board's wheels",
        INSTALL_SECONDS,
        say,
    )
    say(f"package: unpacked into {site}{took(started)}")
    shutil.rmtree(fresh / "bin", ignore_errors=True)  # scripts with this machine's Python in the shebang
    for record in fresh.glob("*.dist-info/*"):
        if record.name in ("direct_url.json", "RECORD", "REQUESTED", "INSTALLER"):
            record.unlink()  # pip's own records, with paths of this machine
    launcher = fresh / "bin" / "axrun"
    launcher.parent.mkdir()
    launcher.write_text(LAUNCHER)
    launcher.chmod(0o755)
    shutil.rmtree(site, ignore_errors=True)
    fresh.rename(site)


def _name_by_hash(wheels: Path, path: Path) -> None:
    """Writes the wheelhouse's requirements.txt. A wheel's file name starts with its project's name and version."""
    lines = []
    for wheel in sorted(wheels.glob("*.whl")):
        found = re.match(r"([A-Za-z0-9_.]+)-([^-]+)-", wheel.name)
        if found is None:
            raise CheckFailed(f"{wheel} is not a valid wheel name")
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
        raise CheckFailed(f"{on_failure}: {command[2]} did not finish within {seconds} s") from None
    if done.returncode:
        said = [line.strip() for line in done.stdout.splitlines() if line.strip()] or ["it printed nothing"]
        errors = [line for line in said if line.lower().startswith("error")]
        raise CheckFailed(f"{on_failure}: {(errors or said)[-1][:300]}\nFix the cause and run the command again.")

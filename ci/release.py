"""Builds the wheels of a release, of axc and of axrun for each machine, twice from the git commit, and compares them.

    out/wheels/axc-<version>-py3-none-any.whl
    out/wheels/axrun-<version>-py3-none-manylinux_2_31_x86_64.whl    with libax_engine
    out/wheels/axrun-<version>-py3-none-manylinux_2_31_aarch64.whl
    out/wheels/SHA256SUMS

The two builds use checkouts in folders with different names, so that a path or timestamp in a wheel is detected.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import axc
import axrun
from axrun.errors import BadInput, CheckFailed
from axrun.format.bundle import sha256
from ci.device.progress import Say, watched
from ci.device.wheelhouse import EPOCH
from engine.build import MACHINES

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path("board", "axrun", "serve", "page", "lib")  # from npm, not in git; package-lock.json fixes its bytes
BUILD_SECONDS = 1800


def make(
    out: Path, machines: Sequence[str] = MACHINES, tag: str = "", say: Say = print, root: Path = ROOT
) -> list[Path]:
    """Builds the wheels of HEAD into `out`/wheels, which is replaced; returns them.

    `tag` is the release's git tag, "v0.1.0"; it must match the version of both packages. Raises BadInput for a wrong
    tag or uncommitted changes, and CheckFailed if the two builds differ.
    """
    check_version(tag, axc.VERSION, axrun.VERSION)
    if changed := _git(root, "status", "--porcelain", "--untracked-files=no").splitlines():
        raise BadInput(f"{changed[0][3:]} has uncommitted changes\nA release is built from a commit: commit them.")
    with tempfile.TemporaryDirectory() as folder:
        first, second = (_build(root, Path(folder) / name, machines, say) for name in ("first", "the-second"))
        compare(first, second)
        made = out / "wheels"
        fresh = made.with_name("wheels.part")
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree(first, fresh)
    wheels = sorted(fresh.glob("*.whl"))
    (fresh / "SHA256SUMS").write_text("".join(f"{sha256(wheel)}  {wheel.name}\n" for wheel in wheels))
    shutil.rmtree(made, ignore_errors=True)
    fresh.rename(made)
    return [made / wheel.name for wheel in wheels]


def check_version(tag: str, *versions: str) -> None:
    """Raises BadInput unless all versions are equal and match `tag`, if given."""
    if len(set(versions)) != 1:
        raise BadInput(
            f"axc is {versions[0]}, but axrun is {versions[1]}\nThey are released together: make them equal."
        )
    if tag and tag != f"v{versions[0]}":
        raise BadInput(f"the tag is {tag}, the packages' VERSION {versions[0]}\nTag v{versions[0]}, or raise VERSION.")


def compare(first: Path, second: Path) -> None:
    """Raises CheckFailed, naming the wheel and the file in it, unless both folders have identical wheels."""
    names = [{wheel.name for wheel in folder.glob("*.whl")} for folder in (first, second)]
    if names[0] != names[1]:
        raise CheckFailed(f"two builds made different wheels: {', '.join(sorted(names[0] ^ names[1]))}")
    for name in sorted(names[0]):
        if (first / name).read_bytes() != (second / name).read_bytes():
            raise CheckFailed(f"two builds of {name} differ: {_difference(first / name, second / name)}")


def _difference(first: Path, second: Path) -> str:
    """The first file that differs between two wheels, or a note that only archive metadata differs."""
    with zipfile.ZipFile(first) as one, zipfile.ZipFile(second) as other:
        crcs = [{item.filename: item.CRC for item in archive.infolist()} for archive in (one, other)]
    differ = sorted(name for name in crcs[0].keys() | crcs[1].keys() if crcs[0].get(name) != crcs[1].get(name))
    return f"{differ[0]}{f' and {len(differ) - 1} more' if differ[1:] else ''}" if differ else "order, times or modes"


def _build(root: Path, checkout: Path, machines: Sequence[str], say: Say) -> Path:
    """Builds the wheels of HEAD in a new checkout folder."""
    checkout.mkdir()
    archive = checkout.with_suffix(".tar")
    _git(root, "archive", "--format=tar", f"--output={archive}", "HEAD")
    with tarfile.open(archive) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Debian 12's Python has no filters
        tar.extractall(checkout)
    if (root / PAGE).is_dir():
        shutil.copytree(root / PAGE, checkout / PAGE)
    wheels = checkout / "wheels"
    _wheel(checkout, wheels, "axc", say)
    for machine in machines:
        _wheel(checkout / "board", wheels, f"axrun for {machine}", say, AXRUN_TARGET=machine)
    return wheels


def _wheel(project: Path, wheels: Path, what: str, say: Say, **environment: str) -> None:
    say(f"wheels: {what} ...")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AXRUN_", "PYTHONPATH"))}
    done = watched(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(wheels)],
        f"  {what}",
        say,
        seconds=BUILD_SECONDS,
        cwd=project,
        environment={**kept, "SOURCE_DATE_EPOCH": EPOCH, **environment},
    )
    if done.returncode:
        said = [line for line in done.stdout.splitlines() if line.strip()] or ["hatchling printed nothing"]
        raise CheckFailed(f"cannot build the wheel of {what}: {said[-1][:300]}")


def _git(root: Path, *words: str) -> str:
    try:
        return subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        raise BadInput("git is not installed; a release is built from a git commit") from None
    except subprocess.CalledProcessError as error:
        raise BadInput(f"git {words[0]}: {error.stderr.strip():.200}") from None

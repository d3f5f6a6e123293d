"""`invoke cross`: reproducible bytes, all wheels for the board, and a wheelhouse that pip accepts offline."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest

from axrun.errors import BadInput
from ci.device.listing import Listing
from ci.device.wheelhouse import PLATFORMS, PYTHONS, Package, cross
from tests import shared

pytestmark = pytest.mark.system
EM_AARCH64 = 183  # https://refspecs.linuxfoundation.org/elf/gabi4+/ch4.eheader.html


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_is_reproducible(aarch64: Package, tmp_path: Path) -> None:
    again = cross(aarch64.python, tmp_path / "elsewhere")
    assert again.listing == aarch64.listing == Listing.of(again.site)
    assert files(again.folder) == files(aarch64.folder)


def test_every_library_is_built_for_the_board(aarch64: Package) -> None:
    libraries = [path for path in aarch64.site.rglob("*.so*") if path.is_file()]
    assert libraries
    for path in libraries:
        head = path.read_bytes()[:20]
        assert head[:4] == b"\x7fELF", path
        assert struct.unpack_from("<H", head, 18)[0] == EM_AARCH64, path


def test_it_has_no_host_paths_or_names(aarch64: Package) -> None:
    """Neither the build path nor the path of the installing Python."""
    places = [str(aarch64.folder.parent).encode(), sys.executable.encode(), sys.prefix.encode()]
    for name, content in files(aarch64.folder).items():
        assert not [place for place in places if place in content], name


@pytest.mark.parametrize("python", PYTHONS)
def test_pip_installs_it_offline_by_hash(python: str, tmp_path: Path) -> None:
    package = shared.board_package(python)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--no-index", "--find-links", package.wheels, "--require-hashes"),
            *("--only-binary=:all:", "--implementation", "cp", "--python-version", python),
            *(word for name in PLATFORMS for word in ("--platform", name)),
            *("--target", tmp_path / "target", "--no-deps", "-r", package.folder / "requirements.txt"),
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "target" / "axrun" / "cli.py").is_file()
    assert (tmp_path / "target" / "axrun" / "serve" / "page" / "lib" / "purify.js").is_file()


def test_a_python_without_a_lock(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no board package for Python 3\.8: there are locks for 3\.9, 3\.10, 3\.11"):
        cross("3.8", tmp_path)

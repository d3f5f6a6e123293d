"""The wheel of axrun, with the engine inside."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from axrun import VERSION
from engine import build as shipped
from tests.engine.conftest import ROOT


def wheel(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AXRUN_")}
    return subprocess.run(
        command,
        cwd=ROOT / "board",
        env={**kept, **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture(scope="module")
def whole(libraries: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    done = wheel(folder, AXRUN_LIBRARIES=str(libraries))
    assert done.returncode == 0, done.stderr
    (made,) = folder.iterdir()
    return made


def test_the_platform_tag(whole: Path) -> None:
    assert whole.name == f"axrun-{VERSION}-py3-none-manylinux_2_31_{shipped.HOST}.whl"


def test_it_has_the_runner_and_the_libraries_but_no_sources(whole: Path, libraries: Path) -> None:
    with zipfile.ZipFile(whole) as archive:
        names = set(archive.namelist())
        for name in shipped.LIBRARIES:
            assert archive.read(f"axrun/engine/lib/{name}") == (libraries / name).read_bytes()
        about = archive.read(f"axrun-{VERSION}.dist-info/WHEEL").decode()
    assert {"axrun/cli.py", "axrun/session/ax_engine.py", "axrun/serve/page/chat.js"} <= names
    assert {name for name in names if name.startswith("axrun/engine/")} == {
        f"axrun/engine/lib/{name}" for name in shipped.LIBRARIES
    }
    assert "axrun/hatch_build.py" not in names
    assert f"Tag: py3-none-manylinux_2_31_{shipped.HOST}" in about
    assert "Root-Is-Purelib: false" in about


def test_it_has_the_files_of_the_page(whole: Path) -> None:
    """Including the Markdown libraries and their licences, if `make page` has installed them."""
    page = ROOT / "board" / "axrun" / "serve" / "page"
    files = {path.relative_to(page).as_posix(): path for path in page.rglob("*") if path.is_file()}
    files.pop("lib/made-from", None)
    with zipfile.ZipFile(whole) as archive:
        inside = {name for name in archive.namelist() if name.startswith("axrun/serve/page/")}
        assert inside == {f"axrun/serve/page/{name}" for name in files}
        for name, path in files.items():
            assert archive.read(f"axrun/serve/page/{name}") == path.read_bytes()


def test_the_build_is_reproducible(whole: Path, libraries: Path, tmp_path: Path) -> None:
    wheel(tmp_path, AXRUN_LIBRARIES=str(libraries))
    assert (tmp_path / whole.name).read_bytes() == whole.read_bytes()


def test_unpacked_it_finds_its_own_engine(whole: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(whole) as archive:
        archive.extractall(tmp_path)
    script = "from axrun.session import ax_engine as ax, libax_engine as lib, usual_engine as usual\n"
    script += "print(lib.library().folder, usual(), ax.version())"
    kept = {name: value for name, value in os.environ.items() if name != "AXRUN_ENGINE"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**kept, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith(f"{tmp_path / 'axrun' / 'engine' / 'lib'} ax axc {VERSION} "), done.stderr


def test_a_wheel_without_the_engine_is_for_any_machine(tmp_path: Path) -> None:
    done = wheel(tmp_path, AXRUN_TARGET="pure")
    assert done.returncode == 0, done.stderr
    (made,) = tmp_path.iterdir()
    assert made.name == f"axrun-{VERSION}-py3-none-any.whl"
    assert not [name for name in zipfile.ZipFile(made).namelist() if "engine/" in name]


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"AXRUN_TARGET": "riscv64"}, "axrun's engine is for x86_64 or aarch64, not for riscv64"),
        ({"AXRUN_LIBRARIES": "nowhere"}, "libax_sys.so is not there for"),
        ({"AXRUN_TARGET": "other", "AXRUN_LIBRARIES": "ours"}, "libax_sys.so is no library for"),
    ],
)
def test_an_impossible_wheel_is_refused(
    environment: dict[str, str], words: str, libraries: Path, tmp_path: Path
) -> None:
    other = next(machine for machine in shipped.MACHINES if machine != shipped.HOST)
    words_of = {"other": other, "ours": str(libraries)}
    done = wheel(tmp_path, **{name: words_of.get(value, value) for name, value in environment.items()})
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())

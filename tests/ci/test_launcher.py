"""The launcher of a board's package imports only the package and Python's library, whatever the board's settings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ci.device.wheelhouse import LAUNCHER

MAIN = """
import json, os, sys
import mine
if __name__ == "__main__":
    print(json.dumps([mine.name, sys.argv[1:], __name__, sys.flags.no_user_site, "site" in sys.modules]))
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "packages" / "1234"
    (folder / "axrun").mkdir(parents=True)
    (folder / "axrun" / "__init__.py").write_text("")
    (folder / "axrun" / "__main__.py").write_text(MAIN)
    (folder / "mine.py").write_text("name = 'the package'\n")
    (folder / "bin").mkdir()
    (folder / "bin" / "axrun").write_text(LAUNCHER)
    return folder


def axrun(package: Path, *arguments: str, **variables: str) -> list[object]:
    link = package.parent / "axrun"
    if not link.exists():
        link.symlink_to(package / "bin" / "axrun")  # as a release has it
    done = subprocess.run(
        ["sh", str(link), *arguments],
        env={**os.environ, **variables},
        cwd=package.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def test_it_takes_the_packages_modules_alone(package: Path, tmp_path: Path) -> None:
    shadow = tmp_path / "shadow"
    shadow.mkdir()
    (shadow / "mine.py").write_text("name = 'a shadow'\n")
    (shadow / "sitecustomize.py").write_text("print('customized')\n")
    shutil.copy(shadow / "mine.py", package.parent)  # the folder it is started from
    home = tmp_path / "home"
    said = axrun(package, "run", "a b", PYTHONPATH=str(shadow), PYTHONSTARTUP=str(shadow / "mine.py"), HOME=str(home))
    assert said == ["the package", ["run", "a b"], "__main__", 1, False]


def test_the_package_stays_as_it_was_deployed(package: Path) -> None:
    before = sorted(package.rglob("*"))
    axrun(package)
    assert sorted(package.rglob("*")) == before
    assert list(package.with_name("1234.compiled").rglob("mine.*.pyc"))


def test_a_stale_compiled_module_in_the_package_is_never_read(package: Path) -> None:
    """Python would take it where its time and size are the source's."""
    source = package / "mine.py"
    stale = "import py_compile, sys; py_compile.compile(sys.argv[1])"
    subprocess.run(["python3", "-c", stale, str(source)], check=True)
    assert list(package.rglob("__pycache__/mine.*.pyc"))
    times = source.stat()
    source.write_text("name = 'the sources'\n")  # as long as before
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert axrun(package)[0] == "the sources"

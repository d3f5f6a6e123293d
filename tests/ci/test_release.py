"""Wheels of a release: built from the commit, reproducible, of one version."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

import axc
from axrun.errors import BadInput, CheckFailed
from axrun.format.bundle import sha256
from ci import release

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "LICENSE", "README.md", "toolchain")


def git(folder: Path, *words: str) -> None:
    own = ("-c", "user.name=test", "-c", "user.email=test@example.invalid", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *own, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiler's sources as a repository of their own."""
    folder = tmp_path_factory.mktemp("repository")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "sources")
    return folder


def test_the_compilers_wheel_is_made_twice_and_named_by_its_digest(repository: Path, tmp_path: Path) -> None:
    said: list[str] = []
    (wheel,) = release.make(tmp_path, machines=(), tag=f"v{axc.VERSION}", say=said.append, root=repository)
    assert wheel.name == f"axc-{axc.VERSION}-py3-none-any.whl"
    assert (tmp_path / "wheels" / "SHA256SUMS").read_text() == f"{sha256(wheel)}  {wheel.name}\n"
    assert said == ["wheels: axc ..."] * 2
    with zipfile.ZipFile(wheel) as archive:
        assert {"axc/cli.py", "axc/families/llama.py"} <= set(archive.namelist())
        assert all(item.date_time[0] == 1980 for item in archive.infolist())


def test_a_change_that_is_not_committed_is_not_released(repository: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(repository, changed)
    (changed / "toolchain" / "axc" / "cli.py").write_text("")
    with pytest.raises(BadInput, match=r"toolchain/axc/cli\.py has uncommitted changes"):
        release.make(tmp_path / "out", machines=(), root=changed)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tag", "versions", "said"),
    [
        ("v0.2.0", ("0.1.0", "0.1.0"), "the tag is v0.2.0, the packages' VERSION 0.1.0"),
        ("0.1.0", ("0.1.0", "0.1.0"), "the tag is 0.1.0"),
        ("", ("0.1.0", "0.2.0"), "axc is 0.1.0, but axrun is 0.2.0"),
    ],
)
def test_another_version_than_the_tags_is_refused(tag: str, versions: tuple[str, ...], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        release.check_version(tag, *versions)


def wheel(folder: Path, text: str, minute: int = 0) -> None:
    folder.mkdir()
    with zipfile.ZipFile(folder / "axc-0.1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("axc/__init__.py", "")
        archive.writestr(zipfile.ZipInfo("axc/cli.py", (1980, 1, 1, 0, minute, 0)), text)


@pytest.mark.parametrize(
    ("text", "minute", "said"), [("/tmp/x", 0, r"differ: axc/cli\.py$"), ("", 1, "differ: order, times or modes")]
)
def test_differing_builds_name_the_file(tmp_path: Path, text: str, minute: int, said: str) -> None:
    wheel(tmp_path / "first", "")
    wheel(tmp_path / "second", text, minute)
    with pytest.raises(CheckFailed, match=said):
        release.compare(tmp_path / "first", tmp_path / "second")


def test_a_wheel_of_only_one_build_is_an_error(tmp_path: Path) -> None:
    wheel(tmp_path / "first", "")
    (tmp_path / "second").mkdir()
    with pytest.raises(CheckFailed, match=r"different wheels: axc-0\.1\.0"):
        release.compare(tmp_path / "first", tmp_path / "second")

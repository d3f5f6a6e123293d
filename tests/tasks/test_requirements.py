"""The lock files, and the behaviour without torch."""

from __future__ import annotations

import ast
import importlib.metadata
import itertools
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from requirements.install import (
    LOCKS,
    NEWEST,
    OLDEST,
    ROOT,
    SETS,
    TORCH_LOCKS,
    NoTorch,
    SetupFailed,
    engine_beside,
    fingerprint,
    install,
    install_peer,
    install_torch,
    torch_wheel,
)

FILES = sorted(LOCKS.glob("*.txt"))


def pins(lock: Path) -> dict[str, list[str]]:
    """`name==version ; marker` of each entry, with its hashes."""
    text = re.sub(r"^\s*#.*\n", "", lock.read_text(), flags=re.M).replace("\\\n", " ")
    entries = (line.split("--hash=") for line in text.splitlines())
    return {entry.strip(): [digest.strip() for digest in digests] for entry, *digests in entries}


@pytest.mark.parametrize("lock", FILES, ids=lambda lock: lock.name)
def test_every_entry_is_one_version_with_hashes_and_no_address(lock: Path) -> None:
    assert pins(lock)
    for entry, digests in pins(lock).items():
        assert re.fullmatch(r"[a-z0-9-]+==[^\s;]+( ; .+)?", entry)
        assert digests
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in digests)
    assert "://" not in lock.read_text()


def test_locked_torch_for_linux_needs_no_accelerator_libraries() -> None:
    """Except with TORCH=pypi."""
    entries = [entry for lock in FILES if lock.name != TORCH_LOCKS["pypi"] for entry in pins(lock)]
    assert not [entry for entry in entries if re.match(r"nvidia|triton|cuda|cupy", entry)]
    torch = [entry for entry in entries if entry.startswith("torch==")]
    assert [re.sub(r"==[\d.]+", "==", entry) for entry in torch] == [
        "torch==+cpu ; sys_platform == 'linux'",
        "torch== ; sys_platform == 'darwin'",
    ]


def test_both_sources_of_torch_lock_one_version_for_every_python() -> None:
    locks = [pins(LOCKS / name) for name in TORCH_LOCKS.values()]
    torches = [(entry, hashes) for lock in locks for entry, hashes in lock.items() if entry.startswith("torch==")]
    assert len({re.split(r"[+ ]", entry)[0] for entry, _ in torches}) == 1
    assert {entry.partition(" ;")[0] for entry in pins(LOCKS / "reference.txt")} >= {
        entry for entry in pins(LOCKS / TORCH_LOCKS["pypi"]) if re.match(r"(filelock|fsspec|jinja2|sympy)==", entry)
    }
    (of_index,) = [hashes for entry, hashes in torches if entry == torches[-1][0]]
    assert len(of_index) >= 2 * (NEWEST[1] - OLDEST[1] + 1)  # x86_64 and aarch64


def test_the_sets_agree_on_every_package_they_share() -> None:
    versions: dict[str, set[frozenset[str]]] = {}
    for lock in (file for file in FILES if not file.name.startswith("board-")):  # locked for other Python versions
        for name in {entry.partition("==")[0] for entry in pins(lock)} - {"torch"}:
            mine = frozenset(entry.partition(" ;")[0] for entry in pins(lock) if entry.startswith(f"{name}=="))
            versions.setdefault(name, set()).add(mine)
    assert len(versions) > 50
    assert {name: found for name, found in versions.items() if len(found) > 1} == {}


def test_an_unknown_set_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(SetupFailed, match=rf"'tests': there are {', '.join(SETS)}"):
        install(tmp_path, "tests")


def test_the_reference_set_accepts_torch_of_either_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment made with TORCH=pypi is reused without it; otherwise the missing pip would fail here."""
    monkeypatch.delenv("TORCH", raising=False)
    for lock in TORCH_LOCKS.values():
        (tmp_path / "reference.installed").write_text(fingerprint(("reference.txt", lock)))
        install(tmp_path, "reference")


def test_torch_can_be_excluded_although_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reference.installed").write_text(fingerprint(SETS["reference"].files))
    monkeypatch.setenv("TORCH", "none")
    with pytest.raises(NoTorch, match=r"^TORCH=none leaves torch out\n"):
        install(tmp_path, "reference")


def test_a_peer_without_a_compiler_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    with pytest.raises(SetupFailed, match=r"no no-such-compiler here\n.*apt-get install g\+\+"):
        install_peer("llama.cpp", tmp_path / "venv")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real environment with pip and uv only, copied from this one because installing pip takes seconds."""
    venv = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    pip = importlib.metadata.distribution("pip")
    for top in {file.parts[0] for file in pip.files or () if ".." not in file.parts}:
        shutil.copytree(str(pip.locate_file(top)), site / top)
    (venv / "bin" / "uv").symlink_to(Path(sys.prefix) / "bin" / "uv")
    return venv


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """pip and uv use a local folder of wheels and no index."""
    for name, value in {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "UV_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("WHEELS", str(tmp_path))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.usefixtures("offline")
def test_a_missing_torch_wheel_is_one_error_with_a_remedy(bare: Path) -> None:
    with pytest.raises(NoTorch) as error:
        install_torch(bare)
    first, second, third = str(error.value).splitlines()
    assert first == f"{torch_wheel()} is not to be had here"
    assert second.startswith("pip says 'ERROR: No matching distribution found for torch==2")
    assert "error: No solution found" in second
    assert third.startswith("make TORCH=pypi ... takes the package index's (3 GB to download), WHEELS=folder ")


def test_a_wheel_with_another_digest_is_refused(bare: Path, offline: Path) -> None:
    (offline / torch_wheel()).write_bytes(b"not the wheel that was locked")
    with pytest.raises(SetupFailed, match="DO NOT MATCH THE HASHES"):
        install_torch(bare)
    assert not list(bare.glob("lib/python*/site-packages/torch*"))


# Declared dependencies and imports

DISTRIBUTIONS = {"huggingface-hub": "huggingface_hub", "prometheus-client": "prometheus_client"}  # where names differ
BUNDLED = {"axc", "axrun", "engine"}
# Declared and imported by others.
INDIRECT = {
    "protobuf": "transformers reads a tokenizer.model with it",
    "sentencepiece": "transformers reads a tokenizer.model with it",
}
# Not declared, with the reason.
UNDECLARED = {
    "hatchling": "board/hatch_build.py is run by the build backend",
    "typing_extensions": "imported for type checkers only",
}


def declared(project: Path) -> set[str]:
    """The import names of all dependencies of a pyproject.toml, extras included."""
    table = tomllib.loads(project.read_text())["project"]
    lines = [*table["dependencies"], *itertools.chain(*table.get("optional-dependencies", {}).values())]
    names = {Requirement(line).name.lower().replace("_", "-") for line in lines}
    return {DISTRIBUTIONS.get(name, name) for name in names} - {"axrun"}


def imported(folder: Path) -> set[str]:
    """The packages of others that the sources in `folder` import, at the top or in a function."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).partition(".")[0])
    return found - set(sys.stdlib_module_names) - BUNDLED


@pytest.mark.parametrize(("package", "project"), [("toolchain", "pyproject.toml"), ("board", "board/pyproject.toml")])
def test_a_package_declares_what_it_imports_and_nothing_else(package: str, project: str) -> None:
    used = imported(ROOT / package)
    assert declared(ROOT / project) - used - set(INDIRECT) == set()
    assert used - declared(ROOT / project) - set(UNDECLARED) == set()


def test_an_engine_build_failure_is_reported_after_the_parallel_work(tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$1" >"$0.built"\nexit 3\n')
    python.chmod(0o755)
    done = False
    told = r"libax_engine was not built\n\(exit code 3: .*/bin/python .*build.py\)"
    with pytest.raises(SetupFailed, match=told), engine_beside(tmp_path):
        done = True
    assert done
    assert python.with_suffix(".built").read_text().endswith("board/engine/build.py\n")

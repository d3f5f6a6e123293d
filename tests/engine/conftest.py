"""The engine, built once for each state of its sources into build/engine, and sessions of it in this process."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "board" / "engine"
CACHE = ROOT / "build" / "engine"
Run = Callable[..., subprocess.CompletedProcess[str]]


def build(name: str, *options: str) -> Path:
    """The folder of the libraries; a build of the same sources with the same options is taken again."""
    digest = hashlib.sha256(" ".join(options).encode())
    for file in sorted(path for path in SOURCE.rglob("*") if path.is_file() and "lib" not in path.parts):
        digest.update(file.relative_to(SOURCE).as_posix().encode() + b"\0" + file.read_bytes())
    folder = CACHE / f"{name}-{digest.hexdigest()[:16]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest-xdist's workers share the folder
        if not (folder / "complete").exists():
            for old in CACHE.glob(f"{name}-*"):
                shutil.rmtree(old)
            for command in (["-S", str(SOURCE), "-B", str(folder), *options], ["--build", str(folder), "-j2"]):
                done = subprocess.run(["cmake", *command], capture_output=True, text=True)
                assert done.returncode == 0, done.stdout + done.stderr
            (folder / "complete").touch()
    return folder


@pytest.fixture(scope="session")
def libraries() -> Path:
    return build("native")


@pytest.fixture(scope="session")
def compile_client(libraries: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Compiles a C or C++ file beside the tests against the engine's headers."""

    def compile_(name: str, *flags: str) -> Path:
        program = tmp_path_factory.mktemp("client") / name.split(".")[0]
        compiler = ["g++", "-std=c++20"] if name.endswith(".cc") else ["gcc", "-std=c11"]
        command = [*compiler, "-Wall", "-Wextra", "-O1", *flags, f"-I{SOURCE / 'include'}"]
        command += [str(Path(__file__).parent / name), "-o", str(program)]
        command += [f"-L{libraries}", "-lax_engine", "-lax_sys", f"-Wl,-rpath,{libraries}", "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return program

    return compile_


@pytest.fixture(scope="session")
def in_process(libraries: Path) -> Run:
    """Runs a script beside the tests in a process of its own: an engine is chosen once for each process."""

    def run(script: str, *arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(Path(__file__).parent / script), *map(str, arguments)],
            env={**os.environ, "AXRUN_ENGINE": str(libraries), "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture(scope="session")
def ax(libraries: Path) -> Any:
    """board.session.ax_engine with the engine just built, in this process."""
    os.environ["AXRUN_ENGINE"] = str(libraries)
    from board import session
    from board.session import ax_engine

    session.ENGINES.setdefault("ax", "board.session.ax_engine")
    return ax_engine

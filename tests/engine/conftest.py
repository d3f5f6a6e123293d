"""The engine as shipped, sessions of it in this process, and other builds of it; each is built once per session."""

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

from engine import build as shipped

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "board" / "engine"
CACHE = ROOT / "build" / "engine"
Run = Callable[..., subprocess.CompletedProcess[str]]


def build(name: str, *options: str, targets: tuple[str, ...] = ()) -> Path:
    """The folder of a cmake build with `options`; without options, of the shipped libraries."""
    if not options:
        return shipped.build()
    digest = hashlib.sha256(f"{shipped.fingerprint()} {' '.join([*options, *targets])}".encode())
    for file in sorted(SOURCE.glob("fuzz/*.cc")):
        digest.update(file.read_bytes())
    folder = CACHE / f"{name}-{digest.hexdigest()[:16]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest-xdist's workers share the folder
        if not (folder / "complete").exists():
            for old in CACHE.glob(f"{name}-*"):
                shutil.rmtree(old)
            wanted = ["--target", *targets] if targets else []
            for command in (["-S", str(SOURCE), "-B", str(folder), *options], ["--build", str(folder), "-j2", *wanted]):
                done = subprocess.run(
                    [shipped.program("cmake", "data/bin/cmake"), *command], capture_output=True, text=True
                )
                assert done.returncode == 0, done.stdout + done.stderr
            (folder / "complete").touch()
    return folder


@pytest.fixture(scope="session")
def libraries() -> Path:
    """The libraries for this machine, rebuilt if sources changed; or those in AXRUN_ENGINE."""
    asked = os.environ.get("AXRUN_ENGINE")
    return Path(asked) if asked else shipped.build()


def compile_client(name: str, libraries: Path, made: Path, machine: str = shipped.HOST) -> Path:
    """Compiles a C++ file of this folder against the engine's headers, with the engine's compiler."""
    command = [shipped.program("ziglang", "zig"), "c++", "-target", f"{machine}-linux-gnu.{shipped.GLIBC}"]
    command += ["-std=c++20", "-Wall", "-Wextra", "-O3", "-s", f"-I{SOURCE / 'include'}"]
    command += [str(Path(__file__).parent / name)]
    command += ["-o", str(made), f"-L{libraries}"]
    # linked by the vendor's runner
    command += ["-Wl,--no-as-needed", "-lax_engine", "-lax_interpreter", "-lax_sys", f"-Wl,-rpath,{libraries}"]
    env = shipped.environment(SOURCE / "build" / "cache")
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return made


@pytest.fixture(scope="session")
def runner(libraries: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled runner.cc."""
    return compile_client("runner.cc", libraries, tmp_path_factory.mktemp("client") / "runner")


@pytest.fixture(scope="session")
def in_process(libraries: Path) -> Run:
    """Runs a script of this folder in a separate process, because a process can load only one engine."""

    def run(script: str, *arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(Path(__file__).parent / script), *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture(scope="session")
def ax(libraries: Path) -> Any:
    """axrun.session.ax_engine with the shipped engine, in this process."""
    from axrun.session import ax_engine, libax_engine

    assert libax_engine.library().folder == str(libraries)
    return ax_engine

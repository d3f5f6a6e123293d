"""Builds libax_engine for x86-64 or arm64 Linux with what PyPI has: the compiler ziglang, cmake and ninja.

    python board/engine/build.py [--machine aarch64] [--into FOLDER]

The libraries need a system with glibc 2.31 or newer, as boards and Debian 11 have it, and no C++ runtime. The same
sources give the same bytes wherever they lie. It runs before anything of ours is installed: standard library only.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

ENGINE = Path(__file__).resolve().parent
HOST = platform.machine()
MACHINES = ("x86_64", "aarch64")
GLIBC = "2.31"
LIBRARIES = tuple(
    f"{folder}lib{name}.so" for folder in ("", "ax630c/") for name in ("ax_sys", "ax_engine", "ax_interpreter")
)
STAMP = "built.sha256"
TOOLS = ("ziglang", "cmake", "ninja")
SOURCES = ("CMakeLists.txt", "exports.map", "build.py", "include/**/*.h", "src/**/*.h", "src/**/*.cc")
MOST_CACHED = 1 << 30  # bytes of the compiler's cache: it never forgets by itself


class NotBuilt(Exception):
    """The engine cannot be built here; the message says what to do."""

    exit_code = 2


def build(
    into: Path = ENGINE / "lib",
    machine: str = HOST,
    engine: Path = ENGINE,
    work: Path = ENGINE / "build",
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> Path:
    """Brings the libraries of `machine` into the folder `into`, unless those of the same sources are there; returns it.

    `work` keeps the compiler's cache and objects for the next time. Raises NotBuilt.
    """
    if machine not in MACHINES:
        raise NotBuilt(f"the engine is built for Linux on {' or '.join(MACHINES)}, not on {machine}")
    wanted = fingerprint(engine, machine)
    if is_built(into, wanted):
        return into
    tree = work / machine
    tree.mkdir(parents=True, exist_ok=True)
    with (work / f"{machine}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_built(into, wanted):  # by who held the lock
            return into
        started = time.monotonic()
        say(f"setup: libax_engine for {machine} (a minute or two the first time) ...")
        compile_(engine, tree, machine, environment(work / "cache"))
        while (now := fingerprint(engine, machine)) != wanted:  # edited meanwhile: objects of both would be linked
            wanted = now
            compile_(engine, tree, machine, environment(work / "cache"))
        for name in LIBRARIES:
            made = into / name
            made.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(tree / name, made.with_suffix(".new"))
            os.replace(made.with_suffix(".new"), made)  # who has the old one loaded keeps it
        (into / STAMP).write_text(wanted)
        say(f"setup: libax_engine is there after {time.monotonic() - started:.0f} s")
    return into


def is_built(folder: Path, wanted: str) -> bool:
    stamp = folder / STAMP
    return stamp.is_file() and stamp.read_text() == wanted and all((folder / name).is_file() for name in LIBRARIES)


def fingerprint(engine: Path = ENGINE, machine: str = HOST) -> str:
    """What the libraries depend on: the sources, the version they show, the compiler and the machine."""
    digest = hashlib.sha256(f"{machine} {' '.join(map(version_of, TOOLS))}".encode())
    sources = {path for pattern in SOURCES for path in engine.glob(pattern)}
    for path in sorted({*sources, engine.parent / "axrun" / "__init__.py"}):
        name = os.path.relpath(path, engine)
        digest.update(f"\0{name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def version_of(tool: str) -> str:
    try:
        return metadata.version(tool)
    except metadata.PackageNotFoundError:
        return "none"


def compile_(engine: Path, tree: Path, machine: str, env: dict[str, str]) -> None:
    cmake = program("cmake", "data/bin/cmake")
    compiler = f"{program('ziglang', 'zig')};c++;-target;{machine}-linux-gnu.{GLIBC};-O3;-s"
    settings = {
        "CMAKE_MAKE_PROGRAM": program("ninja", "ninja"),
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": machine,
        "CMAKE_CXX_COMPILER": compiler,
        "CMAKE_TRY_COMPILE_CONFIGURATION": "Release",  # else the compiler makes a second libc++, for debugging
    }
    defined = [f"-D{name}={value}" for name, value in settings.items()]
    run([cmake, "-S", str(engine), "-B", str(tree), "--fresh", "-G", "Ninja", *defined], env)
    run([cmake, "--build", str(tree)], {**env, "NINJA_STATUS": "[%f/%t] "}, shown())


def shown() -> Callable[[str], None]:
    """Shows ninja's status lines as a progress bar on a terminal.

    By axrun's code, from its file: axrun may not be installed yet. The cursor goes back to the start of the line, for
    the setup writes its own lines meanwhile.
    """
    path = ENGINE.parent / "axrun" / "progress.py"
    spec = importlib.util.spec_from_file_location("engine_progress", path)
    assert spec is not None
    assert spec.loader is not None
    progress = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(progress)

    def show(line: str) -> None:
        if step := re.match(r"\[(\d+)/(\d+)\] ", line):
            done, total = int(step[1]), int(step[2])
            progress.show_on_terminal(progress.Progress(done, total, "engine"))
            if done < total and sys.stderr.isatty():
                print(end="\r", file=sys.stderr, flush=True)

    return show


def program(package: str, path: str) -> str:
    """A program inside a package of PyPI, or one of its name on the PATH. Raises NotBuilt."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    for inside in (Path(folder) / path for folder in folders or ()):
        if inside.is_file():
            return str(inside)
    name, beside = Path(path).name, os.path.dirname(sys.executable)
    found = shutil.which(name, path=beside) or shutil.which(name)
    if found is None:
        raise NotBuilt(
            f"the engine's compiler is not installed: there is no package {package}\n"
            f"pip install {' '.join(TOOLS)}; or for a wheel without the engine: AXRUN_TARGET=pure"
        )
    return found


def environment(cache: Path) -> dict[str, str]:
    """This environment, with the compiler's cache in the build folder and none of a user's flags."""
    if cache.is_dir() and sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) > MOST_CACHED:
        shutil.rmtree(cache)
    flags = re.compile(r"C(XX|PP)?FLAGS|LDFLAGS|CXX|CC")
    kept = {name: value for name, value in os.environ.items() if not flags.fullmatch(name)}
    return {**kept, "ZIG_GLOBAL_CACHE_DIR": str(cache), "ZIG_LOCAL_CACHE_DIR": str(cache)}


def run(command: list[str], env: dict[str, str], seen: Callable[[str], None] = lambda line: None) -> None:
    """`seen` gets each line that it writes. Raises NotBuilt."""
    with subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            seen(line)
    if process.returncode:
        wrong = [line for line in lines if re.search(r"error:|CMake Error", line)] or lines
        raise NotBuilt("\n".join([f"the engine does not build: {command[0]} {command[1]} says", *wrong[-3:]]))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Builds libax_engine.")
    parser.add_argument("--machine", choices=MACHINES, default=HOST, help="what it is for (default: this one)")
    parser.add_argument("--into", type=Path, default=ENGINE / "lib", help="where it goes (default engine/lib)")
    arguments = parser.parse_args(argv)
    try:
        build(arguments.into, arguments.machine)
    except (NotBuilt, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

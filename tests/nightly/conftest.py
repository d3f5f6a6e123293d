"""Whole nights on a private emulated board, and a check that nothing is left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ci.device import place, virtual_board
from ci.device.place import Board
from requirements.install import install
from tests import shared

ROOT = Path(__file__).resolve().parents[2]
VIRTUAL = ROOT / "ci" / "boards" / "virtual.yaml"
NIGHT_SECONDS = 900  # generous, for a busy machine
MARK = "NIGHT_OF_A_TEST"  # in the environment of everything a night starts


def loopback() -> str:
    """An unused loopback address for a board."""
    for last in range(1, 255):
        address = f"127.130.{os.getpid() % 250}.{last}"
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, 2222))
            return address
    raise AssertionError("no loopback address is free")


@pytest.fixture(scope="session", autouse=True)
def labgrid() -> None:
    install(Path(sys.prefix), "boards")


@dataclass
class Night:
    """A running night, its console output, and its verdict (printed last)."""

    process: subprocess.Popen[str]
    mark: str
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.said.append(line.rstrip("\n"))

    def wait_for(self, line: str, times: int = 1) -> None:
        """Waits for a console line with this beginning, or for `count` of them."""
        self.wait_until(lambda: sum(entry.startswith(line) for entry in self.said) >= times)

    def wait_until(self, seen: Callable[[], bool]) -> None:
        deadline = time.monotonic() + NIGHT_SECONDS
        while not seen():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.05)

    def end(self) -> tuple[int, list[str]]:
        """Waits for the end; exit code and verdict. Prints the console, which pytest shows if the test fails."""
        self.process.wait(NIGHT_SECONDS)
        self._reader.join(60)
        assert self.process.stdout
        out = self.process.stdout.read()  # short enough for the pipe's buffer
        print("\n".join([*self.said, out]))
        return self.process.returncode, out.splitlines()


@dataclass(frozen=True)
class Desk:
    """A private virtual board and a folder for its nights."""

    board: Board
    folder: Path

    @property
    def history(self) -> Path:
        return self.folder / "history"

    @property
    def root(self) -> Path:
        """The local path of the releases folder on the board."""
        return self.board.state / "rootfs" / "home" / "board" / self.board.root

    def yaml(self, name: str, on: str | None = None, off: str | None = None) -> Path:
        """The board's environment with other power commands."""
        text = VIRTUAL.read_text().replace("$BASE/../..", str(ROOT))
        for key, command in (("cmd_on", on), ("cmd_off", off)):
            if command is not None:
                text = re.sub(f"{key}: .*", f"{key}: {command}", text)
        file = self.folder / f"{name}.yaml"
        file.write_text(text)
        return file

    def variables(self) -> dict[str, str]:
        """Environment variables for commands that use this board."""
        kept = {key: value for key, value in os.environ.items() if key not in ("LG_PLACE", place.HELD)}
        return {**kept, **self.board.variables()}

    def start(self, *flags: str, board: str = "virtual", counts: bool = True) -> Night:
        """Starts a night. Without `counts`, valgrind is hidden, so that the night skips counting instructions."""
        mark = uuid.uuid4().hex
        path = {} if counts else {"PATH": str(self._path_without("valgrind"))}
        where = ["--board", board, "--out", str(self.folder / "out"), "--history", str(self.history)]
        process = subprocess.Popen(
            [sys.executable, "-m", "invoke", "nightly", *where, *flags],
            cwd=ROOT,
            env={**self.variables(), **path, MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        return Night(process, mark)

    def _path_without(self, program: str) -> Path:
        """A folder with links to all programs of PATH except one."""
        links = self.folder / f"without {program}"
        if not links.is_dir():
            links.mkdir()
            folders = [Path(name) for name in os.environ["PATH"].split(os.pathsep) if Path(name).is_dir()]
            files = {file.name: file for folder in reversed(folders) for file in folder.iterdir()}
            for name in files.keys() - {program}:
                (links / name).symlink_to(files[name])
        return links

    def newest(self) -> Path:
        """The folder of the latest night."""
        return max((self.folder / "out" / "nightly" / "virtual" / "nights" / "tiny-qwen2").iterdir())

    def running(self, night: Night) -> list[int]:
        """The processes started by a night, except those on the board."""
        return [pid for pid, _ in processes() if _of(pid, night.mark, Path("/nonexistent"))]

    def invoke(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "invoke", *words, "--board", "virtual"]
        return subprocess.run(
            command, cwd=ROOT, env=self.variables(), capture_output=True, text=True, timeout=NIGHT_SECONDS
        )

    def left(self, night: Night) -> list[str]:
        """Processes and locks left behind by a night; normally empty."""
        found = [f"process {pid}: {what}" for pid, what in processes() if _of(pid, night.mark, self.board.state)]
        if virtual_board.running(self.board):
            found.append("the board is on")
        with (self.board.state / "lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append("the board is locked")
        return found


def processes() -> Iterator[tuple[int, str]]:
    """(pid, command line) of every process of this machine."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            yield int(entry.name), (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue


def commands(pids: Iterable[int]) -> list[str]:
    """The command lines of those processes that are still running."""
    wanted = set(pids)
    return [what for pid, what in processes() if pid in wanted]


def on_board(board: Board) -> list[int]:
    """The processes on the board: those with the board's root folder."""
    return [pid for pid, _ in processes() if _root(pid) == board.state / "rootfs"]


def _of(pid: int, mark: str, state: Path) -> bool:
    try:
        marked = mark.encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        marked = False
    return marked or _root(pid) == state / "rootfs"


def _root(pid: int) -> Path | None:
    try:
        return Path(os.readlink(f"/proc/{pid}/root"))
    except OSError:
        return None


@pytest.fixture(scope="session")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """One board for all nights: unchanged files on its disk are not transferred again."""
    folder = tmp_path_factory.mktemp("nights")
    state = folder / "state"
    state.mkdir(mode=0o700)
    shared.copy_board_package(place.find("virtual").python, folder / "out" / "nightly" / "virtual")
    yield Desk(dataclasses.replace(place.find("virtual"), state=state, address=loopback()), folder)
    virtual_board.down(dataclasses.replace(place.find("virtual"), state=state))
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def bundle(desk: Desk) -> Path:
    """A bundle with reference logits like the nightly's; nights that test something else start from it."""
    from ci.nightly.pipeline import TEXT, sizes

    path = desk.folder / "bundle"
    checkpoint = ["--input_path", str(ROOT / "models" / "tiny-qwen2")]
    flags = ["--prefill_len", "64", "--kv_cache_len", "255", "--model_name", "tiny-qwen2", "--check_level", "-1"]
    flags += [word for length in (64, 128, 192) for word in ("--last_kv_cache_len", str(length))]

    def axc(*words: str) -> None:
        command = [sys.executable, "-m", "axc", *words]
        subprocess.run(command, cwd=ROOT, check=True, timeout=NIGHT_SECONDS, stdout=subprocess.DEVNULL)

    axc("llm_build", *checkpoint, "--output_path", str(path), *flags)
    axc("reference", *checkpoint, "--text", str(TEXT), "--bundle", str(path), *sizes(255))
    return path

"""The inventory of a board: digests of files, symlinks, the interpreter, and an id of the current boot."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from ci.device.on_board import proc

BLOCK = 1 << 20


def entries(folder: Path) -> Iterator[list[str]]:
    """[path, kind] of everything under a folder except non-empty folders."""
    waiting = [folder]
    while waiting:
        inside = waiting.pop()
        listed = sorted(os.scandir(str(inside)), key=lambda entry: entry.name)
        if not listed and inside != folder:
            yield [inside.relative_to(folder).as_posix(), "empty folder"]
        for entry in listed:
            path = Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                waiting.append(path)
            else:
                yield [path.relative_to(folder).as_posix(), kind(path)]


def kind(path: Path) -> str:
    """A file's sha256, "link to ...", "folder", "nothing", or "no file" for a device and the like."""
    try:
        mode = os.lstat(str(path)).st_mode
    except FileNotFoundError:
        return "nothing"
    if stat.S_ISLNK(mode):
        return f"link to {os.readlink(str(path))}"
    if stat.S_ISDIR(mode):
        return "folder"
    return sha256(path) if stat.S_ISREG(mode) else "no file"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(BLOCK), b""):
            digest.update(block)
    return digest.hexdigest()


def interpreter() -> dict[str, str]:
    """The user's python3: the file `found` in PATH, and the `program` that actually runs, both with sha256."""
    found = shutil.which("python3") or ""
    program = os.path.realpath(sys.executable or found)
    return {
        "found": os.path.realpath(found) if found else "",
        "found_sha256": _digest(found),
        "program": program,
        "program_sha256": _digest(program),
        "version": platform.python_version(),
    }


def _digest(path: str) -> str:
    try:
        return sha256(Path(path))
    except OSError:
        return "unreadable"


def boot() -> str:
    """A text that changes with every boot: the kernel's boot id and the start time of pid 1."""
    first = proc.read("/proc/1/stat").rpartition(")")[2].split()
    return f"{proc.read('/proc/sys/kernel/random/boot_id').strip()} {first[19] if len(first) > 19 else ''}"

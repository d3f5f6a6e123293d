"""What lies on a board, file by file: digests, links, and whether the board was started anew meanwhile."""

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
    """[path, what] of everything below a folder but the folders that hold something."""
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
    """The python3 that commands of this user find: `found` in PATH, the `program` that runs by it, both by sha256."""
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
    """Another text after every start of the board: its kernel's, and of its first process."""
    first = proc.read("/proc/1/stat").rpartition(")")[2].split()
    return f"{proc.read('/proc/sys/kernel/random/boot_id').strip()} {first[19] if len(first) > 19 else ''}"

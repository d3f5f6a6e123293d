"""Checks a package's bytecode: recompiles every source and compares the result with the .pyc file.

A manipulated .pyc file runs instead of its source and leaves no other trace, because the source is unchanged.
"""

from __future__ import annotations

import importlib.util
import marshal
import os
import time
from pathlib import Path

HEADER = 16  # bytes before the code: PEP 552
MOST_FAULTS = 20


def faults(folder: Path, seconds: float) -> list[str]:
    """Faults of the .pyc files under `folder`, which mirrors the sources' absolute paths (PYTHONPYCACHEPREFIX).

    Files that were not checked within `seconds` are a fault too.
    """
    found = []
    deadline = time.monotonic() + seconds
    files = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    for number, file in enumerate(files):
        if time.monotonic() > deadline:
            found.append(f"{len(files) - number} of {len(files)} were not checked within {seconds:.0f} s")
            break
        if why := _fault(file, Path("/") / file.relative_to(folder)):
            found.append(f"{file.relative_to(folder)} {why}")
    return found[:MOST_FAULTS]


def _fault(file: Path, beside: Path) -> str:
    """The fault of a .pyc file; its source is in the folder of `beside`."""
    source = beside.with_name(f"{file.name.partition('.')[0]}.py")
    if file.is_symlink() or not file.is_file() or file.suffix != ".pyc":
        return "is not a .pyc file"
    try:
        data, text = file.read_bytes(), source.read_bytes()
        if data[:4] != importlib.util.MAGIC_NUMBER:
            return "is of another Python"
        same = marshal.loads(data[HEADER:]) == compile(text, str(source), "exec", dont_inherit=True)
    except (OSError, ValueError, EOFError, TypeError, SyntaxError) as error:
        return f"cannot be compared with {source}: {error}"
    return "" if same else f"is not what Python compiles of {source}"


def folder(package: Path) -> Path:
    """The folder where the launcher keeps the bytecode of a package."""
    return Path(f"{os.path.realpath(package)}.compiled")

"""Commands for error messages, written so that the user can paste them into the current shell and folder.

`invoke` may not be on the PATH (README: `.venv/bin/invoke`), and the current folder may be outside the checkout.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def invoke(task: str, *words: str) -> str:
    """An Invoke task with its options, quoted for a shell."""
    return _shell([program("invoke"), *_search_root(), task, *words])


def python(module: str, *words: str) -> str:
    """`python -m module` of this environment; it must run in the checkout."""
    command = _shell([program("python"), "-m", module, *words])
    return command if Path.cwd() == ROOT else f"cd {shlex.quote(str(ROOT))} && {command}"


def make(target: str, *settings: str) -> str:
    """`make target NAME=value ...`; make values that are folders absolute if the user may be in another folder."""
    return _shell(["make", *([] if _at_root() else ["-C", str(ROOT)]), target, *settings])


def program(name: str) -> str:
    """A program of this environment as this shell finds it: by name if it is on the PATH, else by path."""
    ours = Path(sys.prefix) / "bin" / name
    found = shutil.which(name)
    if found is not None and Path(found).absolute() == ours.absolute():
        return name
    if not ours.is_file():
        return name
    return str(ours.relative_to(Path.cwd())) if ours.is_relative_to(Path.cwd()) and _at_root() else str(ours)


def _search_root() -> list[str]:
    """--search-root, unless the current folder is inside the checkout, where Invoke finds tasks.py itself."""
    here = Path.cwd()
    return [] if here == ROOT or ROOT in here.parents else ["--search-root", str(ROOT)]


def _at_root() -> bool:
    """Whether the user's folder is the checkout. `make -C` changes the folder itself and sets the flag w."""
    moved = "w" in os.environ.get("MAKEFLAGS", "").partition(" ")[0]
    return Path.cwd() == ROOT and not moved


def _shell(words: list[str]) -> str:
    return " ".join(shlex.quote(word) for word in words)

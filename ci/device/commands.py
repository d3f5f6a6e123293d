"""Our own commands as messages name them: pasted into the user's shell, in the user's own folder, they work.

`invoke` may not be on the PATH (README calls `.venv/bin/invoke`), and the user may stand outside the checkout.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def invoke(task: str, *words: str) -> str:
    """`task` of ours with its options, quoted for a shell."""
    return _shell([program("invoke"), *_search_root(), task, *words])


def python(module: str, *words: str) -> str:
    """`python -m module` of this environment; its modules are found from the checkout only."""
    command = _shell([program("python"), "-m", module, *words])
    return command if Path.cwd() == ROOT else f"cd {shlex.quote(str(ROOT))} && {command}"


def make(target: str, *settings: str) -> str:
    """`make target NAME=value ...`; values that are folders must be absolute where the user may stand elsewhere."""
    return _shell(["make", *([] if _at_root() else ["-C", str(ROOT)]), target, *settings])


def program(name: str) -> str:
    """How this shell finds a program of this environment: by its name, or by its path from here."""
    ours = Path(sys.prefix) / "bin" / name
    found = shutil.which(name)
    if found is not None and Path(found).absolute() == ours.absolute():
        return name
    if not ours.is_file():
        return name
    return str(ours.relative_to(Path.cwd())) if ours.is_relative_to(Path.cwd()) and _at_root() else str(ours)


def _search_root() -> list[str]:
    """Invoke looks for tasks.py in the current folder and those above it."""
    here = Path.cwd()
    return [] if here == ROOT or ROOT in here.parents else ["--search-root", str(ROOT)]


def _at_root() -> bool:
    """Whether the user stands in the checkout: `make -C` moves there itself and tells by the flag w."""
    moved = "w" in os.environ.get("MAKEFLAGS", "").partition(" ")[0]
    return Path.cwd() == ROOT and not moved


def _shell(words: list[str]) -> str:
    return " ".join(shlex.quote(word) for word in words)

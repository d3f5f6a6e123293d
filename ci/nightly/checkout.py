"""What identifies the code of a night: the checkout's commit, and the locked version of every requirement."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def commit() -> str:
    """The commit, with + if tracked files differ from it; empty outside a git checkout."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def pins() -> dict[str, str]:
    """The locked version of every requirement; those of a board have its lock file's name as prefix."""
    found = {}
    for lock in sorted((ROOT / "requirements").glob("*.txt")):
        where = f"{lock.stem}: " if lock.stem.startswith("board-") else ""
        for name, version in re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", lock.read_text("utf-8"), re.M):
            found[where + name] = version
    return found


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()

"""Changes since the last green night: commits, requirement pins, the board, engine, reference, bundle."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ci.nightly.history import Night

MOST_COMMITS = 40
GIT_SECONDS = 20
REFERENCE = "reference.npz"


@dataclass(frozen=True)
class Changes:
    """`commits` are (short id, subject), `others` (what, before, now). `note` says why commits are missing."""

    since: Night
    commits: tuple[tuple[str, str], ...]
    note: str
    others: tuple[tuple[str, str, str], ...]

    @property
    def none(self) -> bool:
        return not self.commits and not self.others and not self.note


def between(since: Night, now: Night, repository: Path) -> Changes:
    """The changes from one night to another."""
    commits, note = _commits(since.commit, now.commit, repository)
    return Changes(since, commits, note, others(since, now))


def others(since: Night, now: Night) -> tuple[tuple[str, str, str], ...]:
    """Changes other than commits: requirements, board, maker, engine, reference, bundle; (what, before, now)."""
    found = [
        *((f"requirement {name}", was, new) for name, was, new in _differences(since.pins, now.pins)),
        *((f"board's {name}", was, new) for name, was, new in _differences(since.machine, now.machine)),
    ]
    for what, was, new in (
        ("maker", since.maker, now.maker),
        ("engine", since.engine, now.engine),
        ("reference logits", since.reference_sha256[:12], now.reference_sha256[:12]),
    ):
        if was != new and new:
            found.append((what, was or "none", new))
    if files := _files(since.files, now.files):
        found.append(("bundle", f"{len(since.files)} files", files))
    return tuple(found)


def other_bytes(since: Night, now: Night) -> Sequence[str]:
    """Files of the bundle with other bytes; ignores the reference logits, which torch does not reproduce exactly."""
    names = sorted({*since.files, *now.files} - {REFERENCE})
    return [name for name in names if since.files.get(name) != now.files.get(name)]


def _differences(was: Mapping[str, str], new: Mapping[str, str]) -> list[tuple[str, str, str]]:
    names = sorted({*was, *new}) if was and new else []
    return [(name, was.get(name, "none"), new.get(name, "none")) for name in names if was.get(name) != new.get(name)]


def _files(was: Mapping[str, str], new: Mapping[str, str]) -> str:
    """The number of files with other bytes, and some of their names."""
    if not was or not new:
        return ""
    changed = [name for name in sorted({*was, *new}) if was.get(name) != new.get(name)]
    if not changed:
        return ""
    shown = ", ".join(changed[:4]) + (f" and {len(changed) - 4} more" if len(changed) > 4 else "")
    return f"{len(changed)} of {len(new)} with other bytes: {shown}"


def _commits(since: str, now: str, repository: Path) -> tuple[tuple[tuple[str, str], ...], str]:
    old, new = since.rstrip("+"), now.rstrip("+")
    note = "the working tree has uncommitted changes" if now.endswith("+") else ""
    if not old or not new or old == new:
        return (), note
    command = ["git", "log", "--no-color", f"-{MOST_COMMITS + 1}", "--format=%h%x00%s", f"{old}..{new}", "--"]
    try:
        done = subprocess.run(
            command, cwd=repository, capture_output=True, text=True, errors="replace", timeout=GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return (), f"commits from {old[:12]} to {new[:12]}: some are missing in this clone; fetch them"
    found = [tuple(line.split("\0", 1)) for line in done.stdout.splitlines()]
    if len(found) > MOST_COMMITS:
        note = f"only the last {MOST_COMMITS} commits are shown" + (f"; {note}" if note else "")
    return tuple((entry[0], entry[1]) for entry in found[:MOST_COMMITS]), note

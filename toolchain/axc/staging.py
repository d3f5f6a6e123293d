"""The staging folder of a build: next to the output path, renamed to it when the bundle is complete.

A killed build leaves its folder; the next build with the same inputs and flags resumes from it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from axc.jobs import DONE
from axrun.errors import BadInput
from axrun.format.bundle import MANIFEST

KEY_FILE = ".build.json"


def staging_path(output: Path) -> Path:
    """The staging folder for `output`, on the same file system."""
    return output.with_name(f".{output.name}.building")


class KeepStaging(Exception):
    """Aborts a build with `reason` and keeps its finished files for the next attempt."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


@contextlib.contextmanager
def staging(output: Path, key: dict[str, Any]) -> Iterator[Path]:
    """The locked staging folder; files of an earlier build are kept only if its `key` was the same.

    It stays if the block raises `KeepStaging` or the process is killed; otherwise it is removed.
    Raises BadInput if another process is building the same bundle, or the folder was not made by a build; OSError.
    """
    folder = staging_path(output)
    made = [parent for parent in (output.parent, *output.parent.parents) if not parent.exists()]
    with contextlib.ExitStack() as undo:
        for parent in reversed(made):
            undo.callback(_remove_empty, parent)
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder, output):
            _refuse_foreign(folder)
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
            try:
                _keep_only(folder, key)
                yield folder
            except KeepStaging as kept:
                undo.pop_all()
                raise kept.reason from None
        undo.pop_all()


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def _locked(folder: Path, output: Path) -> Iterator[None]:
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise BadInput(f"{folder} is a link or a file, and a build needs that name\nMove it away.") from None
        raise
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise BadInput(f"another process is building {output}\nWait for it to end.") from None
    finally:
        os.close(lock)


def _refuse_foreign(folder: Path) -> None:
    if any(folder.iterdir()) and not (folder / KEY_FILE).is_file():
        raise BadInput(f"{folder} holds something that no build made, and a build needs that name\nMove it away.")


def _keep_only(folder: Path, key: dict[str, Any]) -> None:
    text = json.dumps(key, sort_keys=True)
    record = folder / KEY_FILE
    if record.is_file() and record.read_text("utf-8", errors="replace") == text:
        return
    for entry in sorted(
        folder.iterdir(), key=lambda entry: entry.name == KEY_FILE
    ):  # the key file last: _refuse_foreign needs it
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    record.write_text(text, "utf-8")


def publish(folder: Path, output: Path, *, replace: bool) -> None:
    """Renames the finished bundle to `output`; replaces an older one if `replace`. Raises BadInput."""
    for record in [*folder.glob(f"*{DONE}"), folder / KEY_FILE]:
        record.unlink()
    if output.exists() and any(output.iterdir()):
        if not replace:
            raise BadInput(f"{output} came to be while this build ran\nPass --force to replace it.")
        old = output.with_name(f".{output.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        output.rename(old)
        folder.rename(output)
        shutil.rmtree(old)
        return
    folder.rename(output)


def refuse_other_content(output: Path, reason: str = "", *, force: bool) -> None:
    """Raises BadInput if `output` has something other than a bundle, or a bundle and `force` was not given.

    `reason` names the difference from the bundle to be built.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / MANIFEST).is_file():
        raise BadInput(
            f"{output} holds something that is no bundle, and stays as it is\n"
            "Choose another --output_path (make: OUT=folder)."
        )
    if not force:
        raise BadInput(
            f"{output} holds another bundle{': ' if reason else ''}{reason}\n"
            "Pass --force (make: FORCE=1) to replace it, or choose another --output_path (make: OUT=folder)."
        )


def staged_bytes(output: Path) -> int:
    """Bytes already written by an earlier build of `output`."""
    folder = staging_path(output)
    files = [path.with_name(path.name.removesuffix(DONE)) for path in folder.glob(f"*{DONE}")]
    return sum(path.stat().st_size for path in files if path.is_file())

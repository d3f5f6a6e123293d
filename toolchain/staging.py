"""Where a bundle is built: a folder beside its place, renamed into it when whole.

A build that is killed leaves the folder, and the next one with the same inputs and flags goes on from it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from board.bundle import MANIFEST
from board.errors import BadInput
from toolchain.jobs import DONE

KEY_FILE = ".build.json"


def staging_path(output: Path) -> Path:
    """The folder a bundle for `output` is built in: on the same file system."""
    return output.with_name(f".{output.name}.building")


@contextlib.contextmanager
def staging(output: Path, key: dict[str, Any]) -> Iterator[Path]:
    """The staging folder, held by a lock; what another build left there stays only if its `key` was the same.

    Left in place when the block raises `KeepStaging` or the process is killed, removed on every other way out.
    Raises BadInput when another process is building the same bundle.
    """
    folder = staging_path(output)
    made = [parent for parent in (output.parent, *output.parent.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot write to {output.parent}: {error.strerror}\nChoose another --output_path.") from None
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"another process is building {output}\nWait for it to end.") from None
        _keep_only(folder, key)
        try:
            yield folder
        except KeepStaging as kept:
            raise kept.reason from None
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            for parent in made:
                with contextlib.suppress(OSError):
                    parent.rmdir()
            raise
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


class KeepStaging(Exception):
    """Ends a build with `reason` and keeps its finished files for the next try."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


def _keep_only(folder: Path, key: dict[str, Any]) -> None:
    text = json.dumps(key, sort_keys=True)
    record = folder / KEY_FILE
    if not record.is_file() or record.read_text("utf-8") != text:
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        record.write_text(text, "utf-8")


def publish(folder: Path, output: Path, *, replace: bool) -> None:
    """Renames the finished bundle into its place; an older bundle there goes when `replace`. Raises BadInput."""
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


def refuse_other_content(output: Path, *, force: bool) -> None:
    """Raises BadInput when `output` holds anything but a bundle, or a bundle and `force` was not given."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / MANIFEST).is_file():
        raise BadInput(f"{output} holds something that is no bundle, and stays as it is\nChoose another --output_path.")
    if not force:
        raise BadInput(f"{output} holds another bundle\nPass --force to replace it, or choose another --output_path.")

"""Memory limits of control groups: versions 1 and 2, parent groups, page cache; and a real group."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from axrun import free_memory
from axrun.free_memory import MOUNT, memory_left

MB = 1 << 20


def group(folder: Path, names: tuple[str, str, str], limit: str, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(names, (limit, str(used), f"cache 1\n{names[2]} {cached}\nactive_file 5\n"), strict=True):
        (folder / (name if name != names[2] else "memory.stat")).write_text(text + "\n")


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


def seen(tmp_path: Path, lines: str) -> int | None:
    (tmp_path / "cgroup").write_text(lines)
    return memory_left(tmp_path / "cgroup", tmp_path / "mount")


def test_version_2_uses_the_lowest_limit_of_the_group_and_its_parents(tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    group(mount / "a" / "b", V2, "max", 900 * MB, 0)
    assert seen(tmp_path, "0::/a/b\n") is None
    group(mount / "a", V2, str(512 * MB), 500 * MB, 100 * MB)
    assert seen(tmp_path, "0::/a/b\n") == 112 * MB
    group(mount / "a" / "b", V2, str(100 * MB), 70 * MB, 0)
    assert seen(tmp_path, "0::/a/b\n") == 30 * MB
    assert seen(tmp_path, "0::/\n") is None


def test_version_1_without_a_limit(tmp_path: Path) -> None:
    group(tmp_path / "mount" / "memory" / "box", V1, "9223372036854771712", 3 * MB, 0)
    lines = "5:devices:/x\n4:memory,hugetlb:/box\n0::/\n"
    assert seen(tmp_path, lines) is None
    group(tmp_path / "mount" / "memory" / "box", V1, str(64 * MB), 60 * MB, 20 * MB)
    assert seen(tmp_path, lines) == 24 * MB


def test_a_container_with_its_own_group_as_the_root(tmp_path: Path) -> None:
    """Without a cgroup namespace the path is that of the host and does not exist; the mount root is the container's."""
    group(tmp_path / "mount", V2, str(40 * MB), 50 * MB, 0)
    assert seen(tmp_path, "0::/docker/0123\n") == 0


def test_damaged_files_are_ignored(tmp_path: Path) -> None:
    group(tmp_path / "mount", V2, "what", 1, 0)
    assert seen(tmp_path, "nonsense\n0::/../..\n") is None
    assert memory_left(tmp_path / "none", tmp_path) is None


@contextlib.contextmanager
def real_group() -> Iterator[Path]:
    """A control group on this machine with a limit of 256 MB."""
    old = (MOUNT / "memory" / "memory.limit_in_bytes").is_file()
    folder = (MOUNT / "memory" if old else MOUNT) / f"axc-test-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(256 * MB))
        yield folder
    finally:
        folder.rmdir()


@pytest.mark.system
def test_a_process_in_a_real_group_sees_its_limit() -> None:
    whole = free_memory.available()
    assert whole is not None
    code = "from axrun import free_memory; print(free_memory.available())"
    with real_group() as folder:
        done = subprocess.run(
            ["sh", "-c", 'echo $$ >"$1"/cgroup.procs; shift; exec "$@"', "sh", folder, sys.executable, "-c", code],
            capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
    assert 100 * MB < int(done.stdout) < 256 * MB < whole

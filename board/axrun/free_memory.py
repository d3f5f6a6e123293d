"""Memory available to this process: that of the machine, limited by its control groups.

The limit of a container is that of a control group, which /proc/meminfo ignores.
https://docs.kernel.org/admin-guide/cgroup-v2.html#memory and, for version 1,
https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

MEMINFO = Path("/proc/meminfo")  # https://docs.kernel.org/filesystems/proc.html#meminfo
CGROUP = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")
# limit, usage, and the memory.stat key of page cache, which usage includes but the kernel can drop
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = ("memory.max", "memory.current", "inactive_file")


def available(meminfo: Path = MEMINFO) -> int | None:
    """Bytes that can be allocated without swapping, within the limit of the container; None if unknown."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", _text(meminfo))
    if found is None:
        return None
    there, left = int(found[1]) << 10, memory_left()
    return there if left is None else min(there, left)


def memory_left(cgroup: Path = CGROUP, mount: Path = MOUNT) -> int | None:
    """Bytes left in the most restrictive control group; None if no group has a limit."""
    found = [left for folder, names in _groups(cgroup, mount) for left in [_left(folder, *names)] if left is not None]
    return max(min(found), 0) if found else None


def _groups(cgroup: Path, mount: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The control groups from that of this process up to the root; skips those a container cannot see."""
    for number, controllers, path in re.findall(r"^(\d+):([^:]*):/(.*)$", _text(cgroup), re.MULTILINE):
        if number == "0":
            top, names = mount, VERSION_2
        elif "memory" in controllers.split(","):
            top, names = mount / "memory", VERSION_1
        else:
            continue
        folder = top / path
        for group in (folder, *folder.parents):
            if group.is_relative_to(top):
                yield group, names


def _left(folder: Path, limit: str, usage: str, droppable: str) -> int | None:
    most, used = _text(folder / limit).strip(), _text(folder / usage).strip()
    if not (most.isdigit() and used.isdigit()):  # version 2 has "max" for no limit
        return None
    if int(most) >= 1 << 62:  # version 1 has a huge number instead
        return None
    cached = re.search(rf"^{droppable} (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
    return int(most) - int(used) + (int(cached[1]) if cached else 0)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""

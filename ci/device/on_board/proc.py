"""Reads /proc of a board: texts, sizes, the NPU's contiguous memory (CMM)."""

from __future__ import annotations

import os
import re
from pathlib import Path

PROC = Path("/proc")
MOST = 1 << 20  # bytes of a file
ENGINE_LIBRARIES = ("/soc/lib/libax_engine.so", "/usr/lib/libax_engine.so", "/opt/lib/libax_engine.so")


def read(path: str | Path) -> str:
    """A file's text, empty if it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return file.read(MOST).decode("utf-8", "replace")
    except OSError:
        return ""


def size(text: str, name: str) -> int | None:
    """The bytes of a line such as `MemAvailable:  123 kB`."""
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found.group(1)) << 10 if found else None


def memory(name: str) -> int | None:
    """The bytes of an entry of /proc/meminfo."""
    return size(read(PROC / "meminfo"), name)


def resident(pid: int) -> int | None:
    """The resident bytes of a process. Pages that it maps several times count once, unlike in VmRSS."""
    found = size(read(PROC / str(pid) / "smaps_rollup"), "Pss")
    return size(read(PROC / str(pid) / "status"), "VmRSS") if found is None else found


def cmm(key: str) -> int | None:
    """Contiguous memory in bytes; `key` is total or remain."""
    pattern = {"total": r"total size=(\d+)KB", "remain": r"total size.*?remain=(\d+)KB\("}[key]
    found = re.search(pattern, read(PROC / "ax_proc" / "mem_cmm_info"))
    return int(found.group(1)) << 10 if found else None


def system() -> str:
    """The distribution's name and version; empty if unknown."""
    found = re.search(r'^PRETTY_NAME="?([^"\n]*)', read("/etc/os-release"), re.MULTILINE)
    return found.group(1) if found else ""


def vendors_engine() -> str | None:
    """The path of the vendor's engine library, if installed."""
    return next((path for path in ENGINE_LIBRARIES if os.path.exists(path)), None)

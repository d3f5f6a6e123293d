"""What a board's kernel says in files: texts, sizes, the NPU's contiguous memory (CMM)."""

from __future__ import annotations

import os
import re
from pathlib import Path

PROC = Path("/proc")
MOST = 1 << 20  # bytes of a file
ENGINE_LIBRARIES = ("/soc/lib/libax_engine.so", "/usr/lib/libax_engine.so", "/opt/lib/libax_engine.so")


def read(path: str | Path) -> str:
    """A file's text, empty where there is none."""
    try:
        with Path(path).open("rb") as file:
            return file.read(MOST).decode("utf-8", "replace")
    except OSError:
        return ""


def size(text: str, name: str) -> int | None:
    """Bytes of a line such as `MemAvailable:  123 kB`."""
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found.group(1)) << 10 if found else None


def memory(name: str) -> int | None:
    """Bytes of an entry of /proc/meminfo."""
    return size(read(PROC / "meminfo"), name)


def cmm(key: str) -> int | None:
    """Bytes of contiguous memory: `total`, or what may `remain` of it."""
    pattern = {"total": r"total size=(\d+)KB", "remain": r"total size.*?remain=(\d+)KB\("}[key]
    found = re.search(pattern, read(PROC / "ax_proc" / "mem_cmm_info"))
    return int(found.group(1)) << 10 if found else None


def system() -> str:
    """What the distribution calls itself; empty where it does not."""
    found = re.search(r'^PRETTY_NAME="?([^"\n]*)', read("/etc/os-release"), re.MULTILINE)
    return found.group(1) if found else ""


def vendors_engine() -> str | None:
    """The vendor's library, where there is one."""
    return next((path for path in ENGINE_LIBRARIES if os.path.exists(path)), None)

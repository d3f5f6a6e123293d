"""How much memory is left: a board's contiguous memory (CMM) where there is such, else the host's."""

from __future__ import annotations

import re
from pathlib import Path

CMM_INFO = Path("/proc/ax_proc/mem_cmm_info")  # Axera's driver: total size=...,remain=<kb>KB(<mb>MB + <kb>KB)
MEMINFO = Path("/proc/meminfo")  # https://docs.kernel.org/filesystems/proc.html#meminfo


def remaining(cmm_info: Path = CMM_INFO, meminfo: Path = MEMINFO) -> str:
    """As the vendor's runner prints it: `remain_cmm(2048 MB)`, or `remain_mem(...)`; empty where neither is known."""
    cmm = re.search(r"total size.*?remain=\d+KB\((\d+)MB", _text(cmm_info))
    if cmm:
        return f"remain_cmm({cmm[1]} MB)"
    available = re.search(r"MemAvailable:\s+(\d+) kB", _text(meminfo))
    return f"remain_mem({int(available[1]) // 1024} MB)" if available else ""


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""

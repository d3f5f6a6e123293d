"""Description of the machine that ran a measurement: CPU, board and memory, as reported by the kernel."""

from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")

# Names for Arm part numbers (implementer 0x41), as /proc/cpuinfo has only numbers. Source: MIDR_EL1 in the technical
# reference manual of each core.
ARM_PARTS = {
    0xD03: "Cortex-A53",
    0xD04: "Cortex-A35",
    0xD05: "Cortex-A55",
    0xD07: "Cortex-A57",
    0xD08: "Cortex-A72",
    0xD0A: "Cortex-A75",
    0xD0B: "Cortex-A76",
    0xD0C: "Neoverse-N1",
    0xD40: "Neoverse-V1",
    0xD41: "Cortex-A78",
    0xD49: "Neoverse-N2",
}


@dataclass(frozen=True)
class Machine:
    """`cpus` is the number of CPUs this process may use; `board` the device tree model, empty without a device tree."""

    cpu: str
    cpus: int
    board: str
    system: str
    python: str


def describe(proc: Path = PROC) -> Machine:
    """Describes the machine this process runs on."""
    return Machine(
        cpu=_cpu(_text(proc / "cpuinfo")) or platform.machine(),
        cpus=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        board=_text(proc / "device-tree" / "model").rstrip("\0\n"),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
    )


def peak_memory(proc: Path = PROC) -> int | None:
    """Peak resident memory of this process in bytes; None if unknown.

    Not getrusage's ru_maxrss, which a child process inherits from its parent.
    """
    found = re.search(r"^VmHWM:\s+(\d+) kB$", _text(proc / "self" / "status"), re.MULTILINE)
    return int(found[1]) << 10 if found else None


def _cpu(cpuinfo: str) -> str:
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    if named:
        return named[1].strip()
    makers = re.findall(r"^CPU implementer\s*:\s*(0x[0-9a-f]+)$", cpuinfo, re.MULTILINE)
    parts = re.findall(r"^CPU part\s*:\s*(0x[0-9a-f]+)$", cpuinfo, re.MULTILINE)
    cores = [ARM_PARTS.get(int(part, 16), "") for maker, part in zip(makers, parts) if int(maker, 16) == 0x41]
    return " + ".join(f"{cores.count(name)} x {name}" for name in dict.fromkeys(cores) if name)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""

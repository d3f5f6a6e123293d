"""What a build will take of disk and memory, told before it starts, and held against what there is."""

from __future__ import annotations

import resource
import shutil
from dataclasses import dataclass
from pathlib import Path

from board.errors import BadInput
from toolchain.compile import Target
from toolchain.config import ModelConfig
from toolchain.quantizer import WEIGHT_TYPES

PROCESS_BYTES = 200 << 20  # an interpreter with numpy and its threads' stacks, as RLIMIT_DATA counts them
BLOCKS_BYTES = 16 << 20  # the blocks a matrix passes through


@dataclass(frozen=True)
class Budget:
    """Bytes: `disk` still to be written, private `memory` of one process, how many `processes`."""

    disk: int
    memory: int
    processes: int

    def text(self) -> str:
        """One line for the user."""
        return (
            f"needs {megabytes(self.disk)} of disk and {megabytes(self.memory)} of memory "
            f"in each of {self.processes} process{'es' if self.processes > 1 else ''}"
        )


def estimate(config: ModelConfig, target: Target, disk: int, parallel: int) -> Budget:
    """Memory: an interpreter, the blocks in work, and the largest matrix's scales, held until its rows are written."""
    largest = max(config.vocab_size, config.intermediate_size) * config.hidden_size
    scales = 0
    for name in (target.weight_type, target.post_weight_type):
        group = WEIGHT_TYPES[name].group
        scales = max(scales, largest // group * 4 if group else max(config.vocab_size, config.intermediate_size) * 4)
    rotary = target.positions * config.head_dim * 8 * 8  # float64 tables and what they are computed through
    return Budget(disk, PROCESS_BYTES + BLOCKS_BYTES + 2 * scales + rotary, parallel)


def require(budget: Budget, folder: Path) -> None:
    """Raises BadInput when the disk of `folder` or the memory, free or allowed, cannot hold the budget."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < budget.disk:
        raise BadInput(
            f"{folder} has {megabytes(free)} of free disk, the bundle needs {megabytes(budget.disk)}\n"
            "Make room or choose another --output_path."
        )
    available = available_memory()
    if available is not None and available < budget.memory * budget.processes:
        raise BadInput(
            f"{megabytes(available)} of memory are available, {budget.processes} processes need "
            f"{megabytes(budget.memory * budget.processes)}\nClose other programs or lower --parallel."
        )
    for name, limit in (("ulimit -d", resource.RLIMIT_DATA), ("ulimit -v", resource.RLIMIT_AS)):
        allowed = resource.getrlimit(limit)[0]
        if allowed != resource.RLIM_INFINITY and allowed < budget.memory:
            raise BadInput(
                f"{name} allows {megabytes(allowed)} a process, the build needs {megabytes(budget.memory)}\nRaise it."
            )


def available_memory() -> int | None:
    """Bytes the kernel could hand out without swapping; None where it does not say."""
    try:
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return None


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"

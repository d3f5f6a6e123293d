"""What a build will take of disk and memory, told before it starts, and held against what there is."""

from __future__ import annotations

import importlib.util
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path

from axc import rope
from axc.compile import Target, weights
from axc.families.family import ModelConfig
from axc.quantizer import WEIGHT_TYPES
from axrun import free_memory
from axrun.errors import BadInput

PROCESS_BYTES = 200 << 20  # an interpreter with numpy and its threads' stacks, as RLIMIT_DATA counts them
BLOCKS_BYTES = 16 << 20  # the blocks a matrix passes through
PROOF_BYTES = 176 << 20  # transformers and torch, which the tokenizer is compared with
PROOF_SHARE = 40  # bytes for each of the tokenizer's files: it is opened twice


@dataclass(frozen=True)
class Budget:
    """Bytes: `disk` still to be written, private `memory` of one process, how many `processes`.

    `proof` is what the first process takes besides, to compare the tokenizer.
    """

    disk: int
    memory: int
    processes: int
    proof: int = 0

    def text(self) -> str:
        """One line for the user."""
        return (
            f"needs {megabytes(self.disk)} of disk and {megabytes(self.memory)} of memory "
            f"in each of {self.processes} process{'es' if self.processes > 1 else ''}"
            f"{f', and {megabytes(self.proof)} to compare the tokenizer' if self.proof else ''}"
        )


def memory(config: ModelConfig, target: Target) -> int:
    """Private bytes of a process: interpreter, blocks in work, rotary tables, the largest matrix's scales."""
    scales = 0
    for name in (target.weight_type, target.post_weight_type):
        group = WEIGHT_TYPES[name].group
        matrices = (source.shape for source in weights(config).values() if len(source.shape) == 2)
        scales = max(scales, *(rows * columns // group * 4 if group else rows * 4 for rows, columns in matrices))
    rotary = (
        sum(rope.rows(target.positions)) * config.head_dim * 8 * 8
    )  # float64 tables and what they are computed through
    return PROCESS_BYTES + BLOCKS_BYTES + 2 * scales + rotary


def proof(tokenizer_bytes: int) -> int:
    """Private bytes that comparing a tokenizer with transformers takes; none where there is neither."""
    installed = importlib.util.find_spec("transformers") is not None
    return PROOF_BYTES + PROOF_SHARE * tokenizer_bytes if installed and tokenizer_bytes else 0


def require_disk(needed: int, folder: Path) -> None:
    """Raises BadInput when the disk that `folder` is or would be on has less free."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise BadInput(
            f"{folder} has {megabytes(free)} of free disk, the bundle needs {megabytes(needed)}\n"
            "Make room or choose another --output_path."
        )


def require_memory(needed: int, processes: int, proof: int = 0) -> None:
    """Raises BadInput when there is, or a process may take, too little; `proof` is needed by one of them besides."""
    available = available_memory()
    if available is not None and available < needed * processes + proof:
        raise BadInput(
            f"{megabytes(available)} of memory are available, {processes} processes need "
            f"{megabytes(needed * processes + proof)}\nClose other programs or lower --parallel."
        )
    for name, limit in (("ulimit -d", resource.RLIMIT_DATA), ("ulimit -v", resource.RLIMIT_AS)):
        allowed = resource.getrlimit(limit)[0]
        if allowed != resource.RLIM_INFINITY and allowed < needed + proof:
            raise BadInput(
                f"{name} allows {megabytes(allowed)} a process, the build needs {megabytes(needed + proof)}\nRaise it."
            )


def available_memory() -> int | None:
    """Bytes that can be had without swapping, within a container's limit; None where the system does not say."""
    return free_memory.available()


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"

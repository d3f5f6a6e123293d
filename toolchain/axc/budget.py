"""Estimates a build's disk and memory before it starts, and checks that they are available."""

from __future__ import annotations

import importlib.util
import resource
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from axc import rope
from axc.compile import Target, weights
from axc.families.family import ModelConfig
from axc.quantizer import WEIGHT_TYPES
from axc.quantizer.kept import Kept
from axrun import free_memory
from axrun.errors import BadInput

PROCESS_BYTES = 200 << 20  # an interpreter with numpy and thread stacks, as counted by RLIMIT_DATA
BLOCKS_BYTES = 16 << 20  # buffers for blocks of a matrix
PROOF_BYTES = 176 << 20  # transformers and torch, for comparing the tokenizer
PROOF_SHARE = 40  # bytes of memory per byte of the tokenizer's files, which are loaded twice


@dataclass(frozen=True)
class Budget:
    """In bytes: `disk` still to be written, private `memory` per process; the number of `processes`.

    `proof` is additional memory of the first process, for comparing the tokenizer.
    """

    disk: int
    memory: int
    processes: int
    proof: int = 0

    def text(self) -> str:
        """One line for the user."""
        return (
            f"needs {megabytes(self.disk)} of disk and {megabytes(self.memory)} of memory "
            f"{f'in each of {self.processes} processes' if self.processes > 1 else 'in 1 process'}"
            f"{f', and {megabytes(self.proof)} to compare the tokenizer' if self.proof else ''}"
        )


def memory(config: ModelConfig, target: Target) -> int:
    """Private bytes of a process: interpreter, block buffers, rotary tables, the largest matrix's scales."""
    scales = 0
    for name in (target.weight_type, target.post_weight_type):
        group = WEIGHT_TYPES[name].group
        matrices = (source.shape for source in weights(config).values() if len(source.shape) == 2)
        scales = max(scales, *(rows * columns // group * 4 if group else rows * 4 for rows, columns in matrices))
    rotary = (
        sum(rope.rows(target.positions)) * config.head_dim * 8 * 8
    )  # float64 tables and what they are computed through
    return PROCESS_BYTES + BLOCKS_BYTES + 2 * scales + rotary


def reordered(config: ModelConfig, kept: Mapping[str, Kept]) -> int:
    """Private bytes of a process whose rows follow another matrix's columns: the levels of the largest matrix."""
    if not any(kind.reordered for kind in kept.values()):
        return 0
    return max(rows * columns for rows, columns in (weights(config)[name].shape for name in kept))


def proof(tokenizer_bytes: int) -> int:
    """Private bytes for comparing a tokenizer with transformers; 0 without either."""
    installed = importlib.util.find_spec("transformers") is not None
    return PROOF_BYTES + PROOF_SHARE * tokenizer_bytes if installed and tokenizer_bytes else 0


def require_disk(needed: int, folder: Path) -> None:
    """Raises BadInput if the disk of `folder` has less free space."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise BadInput(
            f"{folder} has {megabytes(free)} of free disk, the bundle needs {megabytes(needed)}\n"
            "Make room or choose another --output_path."
        )


def require_memory(needed: int, processes: int, proof: int = 0) -> None:
    """Raises BadInput if too little memory is available or allowed; one process needs `proof` in addition."""
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
    """Memory available without swapping, within a container's limit; None if unknown."""
    return free_memory.available()


def megabytes(count: int) -> str:
    """In MB; in kB below 1 MB, so that nothing small is shown as 0 MB."""
    return f"{count / 1e6:,.0f} MB" if count >= 1e6 else f"{-(-count // 1000)} kB"

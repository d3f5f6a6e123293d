"""Speed of one core with weights of all block sizes and scale types, in decode and prefill.

A matrix larger than the caches, one token: GB/s of the weight's bytes; a smaller one, 41 tokens: billions of operations
a second. The cases take turns, and the best run of each counts: other work on the machine only ever slows one down.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from axrun.session import ax_engine
from tests.bench.tables import record
from tests.engine.test_numerics import levels, linear_file

TURNS = 60
CASES = {  # type of levels, block, type of scales, zero points
    "s4 in 128": ("INT4", 128, "FLOAT", False),
    "s4 in 64": ("INT4", 64, "FLOAT", False),
    "s4 in 64, float16 scales": ("INT4", 64, "FLOAT16", False),
    "s4 in 32": ("INT4", 32, "FLOAT", False),
    "s4 in 32, float16 scales": ("INT4", 32, "FLOAT16", False),
    "s4 in 32, float16 scales, zero points": ("INT4", 32, "FLOAT16", True),
    "s8 by row": ("INT8", 0, "FLOAT", False),
    "s8 in 128": ("INT8", 128, "FLOAT", False),
    "s8 in 64, float16 scales": ("INT8", 64, "FLOAT16", False),
    "s8 in 32, float16 scales": ("INT8", 32, "FLOAT16", False),
}


def runs(folder: Path, rows: int, columns: int, group: int) -> dict[str, tuple[Any, int]]:
    """A bound run of each case, and the size of its weight in bytes."""
    random = np.random.default_rng(0)
    bound = {}
    for name, (dtype, block, scale_dtype, zeros) in CASES.items():
        parts = levels(random, dtype, rows, columns, block, scale_dtype, zeros)
        attributes = {"axis": 1, "block_size": block} if block else {"axis": 0}
        session = ax_engine.open_session(linear_file(folder, parts, attributes), 1)
        tokens = session.groups[group].tokens
        x, y = random.standard_normal((1, tokens, columns), np.float32), np.zeros((1, tokens, rows), np.float32)
        bound[name] = session.bind(group, {"input": x, "output": y}), sum(data.nbytes for *_, data in parts)
    return bound


@pytest.mark.parametrize("columns", [1024, 1536])
def test_block_sizes(columns: int, benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    decode, prefill = (tmp_path / name for name in ("decode", "prefill"))
    decode.mkdir()
    prefill.mkdir()
    few, many = runs(decode, 1 << 16, columns, 0), runs(prefill, 1 << 11, columns, 2)
    best = {(name, what): np.inf for name in CASES for what in ("decode", "prefill")}

    def turn() -> None:
        for what, kind in (("decode", few), ("prefill", many)):
            for name, (bound, _) in kind.items():
                started = time.perf_counter()
                bound.run()
                best[name, what] = min(best[name, what], time.perf_counter() - started)

    benchmark.pedantic(turn, rounds=TURNS)
    rows = []
    for name, (_, nbytes) in few.items():
        speed = nbytes / best[name, "decode"] / 1e9
        operations = 2 * 41 * (1 << 11) * columns / best[name, "prefill"] / 1e9
        rows.append([name, f"{8 * nbytes / (columns << 16):.2f}", f"{speed:.1f}", f"{operations:.0f}"])
    title = f"One core, blocks of weights of {columns} columns"
    record(benchmark, f"blocks-{columns}", title, ["weights", "bits", "decode GB/s", "prefill GOP/s"], rows)

"""Building compared with gguf-py writing Q8_0 of the same weights: wall time, and memory under a limit.

`make bench ARGS='-k build'`. Needs about 6 GB of disk; the 7B case, 40 GB, only with BENCH_7B=1.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from tests.bench.tables import record

ROUNDS = 5
FLAGS = ["--kv_cache_len", "1023", "--prefill_len", "128", "--hidden_state_type", "bf16", "-w", "s8", "--chip", "AX650"]
LIMITS_KB = {"qwen2-0.5b": 800_000, "qwen2-7b": 2_000_000}  # ulimit -d: private memory of each process

GGUF_Q8_0 = """
import sys
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors import safe_open
import ml_dtypes
writer = GGUFWriter(sys.argv[2], "qwen2")
with safe_open(sys.argv[1] + "/model.safetensors", framework="numpy") as file:
    for name in file.keys():
        tensor = file.get_tensor(name).astype(np.float32)
        if tensor.ndim == 2:
            tensor, kind = quants.quantize(tensor, GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0
            writer.add_tensor(name, tensor, raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""


def synth(model: str, folder: Path) -> Path:
    output = folder / model
    subprocess.run([sys.executable, "-m", "axc", "synth", "--model", model, "--output_path", str(output)], check=True)
    return output


def build(checkpoint: Path, output: Path, *more: str, limit_kb: int | None = None) -> float:
    """Seconds of `axc llm_build --parallel 2` without check."""
    shutil.rmtree(output, ignore_errors=True)

    def limit() -> None:
        if limit_kb:
            resource.setrlimit(resource.RLIMIT_DATA, (limit_kb << 10, limit_kb << 10))

    command = [sys.executable, "-m", "axc", "llm_build", "--input_path", str(checkpoint)]
    command += ["--output_path", str(output), *FLAGS, "--parallel", "2", "--check_level", "-1", *more]
    started = time.perf_counter()
    subprocess.run(command, check=True, preexec_fn=limit, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def gguf(checkpoint: Path, output: Path) -> float:
    """Seconds of writing Q8_0 with the PyPI package gguf."""
    output.unlink(missing_ok=True)
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", GGUF_Q8_0, str(checkpoint), str(output)], check=True)
    return time.perf_counter() - started


def test_build_beside_gguf(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    checkpoint = synth("qwen2-0.5b", tmp_path)
    build(checkpoint, tmp_path / "out"), gguf(checkpoint, tmp_path / "q8_0.gguf")  # warm up page cache and caches
    ours, theirs = [], []

    def pair() -> None:
        ours.append(build(checkpoint, tmp_path / "out"))
        theirs.append(gguf(checkpoint, tmp_path / "q8_0.gguf"))

    benchmark.pedantic(pair, rounds=ROUNDS)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    benchmark.extra_info.update(
        build_seconds=median(ours), gguf_q8_0_seconds=median(theirs), ratio=median(ratios), ratios=ratios
    )
    seconds = [("axc llm_build -w s8", ours), ("gguf-py, Q8_0", theirs)]
    rows = [(who, f"{median(took):.2f}", f"{min(took):.2f} to {max(took):.2f}") for who, took in seconds]
    ratio = f"{median(theirs) / median(ours):.2f}x as fast"
    record(
        benchmark,
        "build",
        "Build: Qwen2-0.5B's shapes to 8 bits, two processes",
        ("", "seconds", "range"),
        rows,
        unit="seconds",
        note=f"Pair by pair: {median(ratios):.2f} of gguf-py's time ({min(ratios):.2f} to {max(ratios):.2f}).",
        bars=("seconds",),
        headlines=[("build, Qwen2-0.5B to s8", f"{rows[0][1]} s", f"gguf-py Q8_0 {rows[1][1]} s", ratio)],
    )


@pytest.mark.parametrize("model", ["qwen2-0.5b", *(["qwen2-7b"] if os.environ.get("BENCH_7B") else [])])
def test_build_within_a_memory_limit(model: str, benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    checkpoint = synth(model, tmp_path)
    limit = LIMITS_KB[model]
    seconds = benchmark.pedantic(build, (checkpoint, tmp_path / "out"), {"limit_kb": limit}, rounds=1)
    benchmark.extra_info["ulimit_d_kb"] = limit
    print(f"\n{model} under ulimit -d {limit}: built in {seconds:.1f} s")

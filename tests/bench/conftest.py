"""The peer to compare with in benchmarks, if available, and checkpoints in the shapes of known models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from axc.synth import synth

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def llama() -> str | None:
    """A Python that has llama-cpp-python and gguf, the one that LLAMA_PYTHON names; says how to get one if none is."""
    python = os.environ.get("LLAMA_PYTHON")
    if python is None:
        print("\nwithout llama.cpp, which `make bench PEER=llama.cpp` builds and measures beside us")
    return python


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2-0.5B's shapes with random weights, or the folder BENCH_CHECKPOINT."""
    if given := os.environ.get("BENCH_CHECKPOINT"):
        return Path(given)
    output = tmp_path_factory.mktemp("checkpoint") / "qwen2-0.5b"
    command = [sys.executable, "-m", "axc", "synth", "--model", "qwen2-0.5b", "--output_path", str(output)]
    subprocess.run(command, check=True, cwd=ROOT)
    return output


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M's shapes with random weights."""
    output = tmp_path_factory.mktemp("checkpoint") / "smollm-135m"
    synth("smollm-135m", output)
    return output

"""`make bench` runs every benchmark, or the selected ones."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

from tasks import BENCH
from tests.tasks.test_build import invoke

ROOT = Path(__file__).resolve().parents[2]


def written() -> dict[str, list[str]]:
    """Every benchmark in the sources, and the fixtures that it requests."""
    found = {}
    for path in (ROOT / "tests" / "bench").glob("bench_*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found[f"tests/bench/{path.name}::{node.name}"] = [argument.arg for argument in node.args.args]
    return found


def collected(*more: str) -> set[str]:
    """The benchmarks collected by the command of `make bench`."""
    command = [sys.executable, "-m", *BENCH, *more, "--collect-only", "-q", "-p", "no:cacheprovider"]
    # pytest-benchmark disables itself in xdist workers: the subprocess must not look like one.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return set(re.findall(r"^(tests/\S+?::\w+)", done.stdout, re.M))


def test_every_benchmark_is_collected_and_uses_the_fixture() -> None:
    assert len({name.partition("::")[0] for name in written()}) >= 6
    assert collected() == set(written())
    assert {name for name, asked in written().items() if "benchmark" not in asked} == set()


def test_one_benchmark_file() -> None:
    assert collected("tests/bench/bench_load.py") == {"tests/bench/bench_load.py::test_load_beside_onnxruntime"}


def test_invoke_bench_runs_that_command() -> None:
    done = invoke("bench", "--args", "-k load --collect-only -q")
    assert (done.returncode, done.stderr) == (0, "")
    assert "tests/bench/bench_load.py::test_load_beside_onnxruntime" in done.stdout


def test_an_unknown_peer_lists_the_known_ones() -> None:
    done = invoke("bench", "--peer", "gguf")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no peer is named 'gguf': there is llama.cpp\n"

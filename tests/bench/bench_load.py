"""Loading a bundle in Qwen2-0.5B's shapes: time with files in the page cache, private and shared memory.

`make bench ARGS='-k load'`. Each engine runs in its own process; BENCH_BUNDLE names an existing bundle.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from engine import build as shipped
from tests.bench.tables import record

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 3
MEMORY = ("private", "cache", "before", "shared")

# Prints seconds and bytes as JSON, then its memory for each line it is given. Private is what nobody else can share.
LOAD = """
import json, re, sys, time
from pathlib import Path
from axrun.format.bundle import Bundle
from axrun.model import Model
from axrun.session import engine_version
bundle, engine = Bundle.open(sys.argv[1]), sys.argv[2]
def memory():
    text = Path("/proc/self/smaps_rollup").read_text()
    fields = {name: int(kb) << 10 for name, kb in re.findall(r"^(\\w+): +(\\d+) kB", text, re.M)}
    return {"private": fields["Private_Dirty"], "shared": fields["Rss"] - fields["Private_Dirty"], "pss": fields["Pss"]}
engine_version(engine)
before = memory()["private"]
started = time.perf_counter()
model = Model.load(bundle, engine, 2)
seconds = time.perf_counter() - started
model.forward(list(range(128)))
model.forward([1])
print(json.dumps({"seconds": seconds, "cache": model.decoder.cache.nbytes, "before": before, **memory()}), flush=True)
for _ in sys.stdin:
    print(json.dumps(memory()), flush=True)
"""


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("BENCH_BUNDLE"):
        return Path(given)
    folder = tmp_path_factory.mktemp("load")
    axc = [sys.executable, "-m", "axc"]
    sizes = ["--kv_cache_len", "1023", "--prefill_len", "128", "--check_level", "-1"]
    for command in (
        ["synth", "--model", "qwen2-0.5b", "--output_path", str(folder / "checkpoint")],
        ["llm_build", "--input_path", str(folder / "checkpoint"), "--output_path", str(folder / "bundle"), *sizes],
    ):
        subprocess.run([*axc, *command], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return folder / "bundle"


class Loader:
    """A process that has loaded the bundle and holds it."""

    def __init__(self, bundle: Path, engine: str) -> None:
        command = [sys.executable, "-c", LOAD, str(bundle), engine]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        self.loaded: dict[str, Any] = json.loads(self._out.readline())

    def memory(self) -> dict[str, Any]:
        """Current memory of the process."""
        print(file=self._in, flush=True)
        return dict(json.loads(self._out.readline()))

    def end(self) -> None:
        self._process.communicate()


def test_load_beside_onnxruntime(bundle: Path, benchmark: BenchmarkFixture) -> None:
    shipped.build()
    best: dict[str, dict[str, Any]] = {}

    def round_() -> None:
        for engine in ("ax", "ort"):
            loader = Loader(bundle, engine)
            loader.end()
            if engine not in best or loader.loaded["seconds"] < best[engine]["seconds"]:
                best[engine] = loader.loaded

    benchmark.pedantic(round_, rounds=ROUNDS)
    two = [Loader(bundle, "ax"), Loader(bundle, "ax")]
    together = [loader.memory() for loader in two]
    for loader in two:
        loader.end()
    benchmark.extra_info.update(best=best, together=together)
    weights = sum(file.stat().st_size for file in bundle.glob("*.axmodel"))
    count, pss = len(list(bundle.glob("*.axmodel"))), sum(seen["pss"] for seen in together)
    rows = [
        (engine, f"{seen['seconds']:.3f}", *(f"{seen[what] / 1e6:.1f}" for what in MEMORY))
        for engine, seen in best.items()
    ]
    record(
        benchmark,
        "load",
        f"Load: Qwen2-0.5B's shapes, {count} axmodels, {weights / 1e6:.0f} MB",
        ("engine", "seconds", "private MB", "of it K/V", "before load", "shared MB"),
        rows,
        note=f"Two processes of ax at a time take {pss / 1e6:.0f} MB of memory in all.",
    )

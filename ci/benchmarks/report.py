"""`make bench REPORT=1`: writes a run's tables to docs/benchmarks, docs/benchmarks.md and the README."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from axc import VERSION
from ci.benchmarks import page, plot, results
from ci.benchmarks.results import Table

ROOT = Path(__file__).resolve().parents[2]

# prints the version of the peer
PEER = "from importlib.metadata import version as v; print('llama-cpp-python', v('llama-cpp-python'))"


def versions(peer: str | None) -> str:
    """The versions of axc and the peers."""
    said = [f"axc {VERSION}", f"onnxruntime {version('onnxruntime')}"]
    if peer:
        said.append(subprocess.run([peer, "-c", PEER], check=True, capture_output=True, text=True).stdout.strip())
    return ", ".join(said)


def publish(run: Path, command: str, versions: str, root: Path = ROOT) -> list[Path]:
    """Merges the tables of a run (pytest-benchmark's JSON) and rewrites all files; returns their paths.

    Raises BadInput for a run without tables.
    """
    record = root / "docs" / "benchmarks" / "results.json"
    fresh = results.collect(json.loads(run.read_text("utf-8")), command, versions)
    results.save(record, results.merge(results.load(record), fresh))
    return [record, *write(results.load(record), root)]


def write(tables: Sequence[Table], root: Path) -> list[Path]:
    """Writes the page, the plots and the README's table."""
    docs, readme = root / "docs", root / "README.md"
    (docs / "benchmarks.md").write_text(page.page(tables), "utf-8")
    readme.write_text(page.readme(readme.read_text("utf-8"), tables), "utf-8")
    plots = [(table, docs / "benchmarks" / page.plot_file(table)) for table in tables if table.bars]
    for stale in {*(docs / "benchmarks").glob("*.svg")} - {path for _, path in plots}:
        stale.unlink()
    for table, path in plots:
        plot.draw(table, path)
    return [docs / "benchmarks.md", readme, *(path for _, path in plots)]

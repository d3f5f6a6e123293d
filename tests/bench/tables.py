"""The table that a benchmark prints and stores for docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Sequence

from pytest_benchmark.fixture import BenchmarkFixture

from ci.benchmarks.results import KEY


def record(
    benchmark: BenchmarkFixture,
    name: str,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    unit: str = "",
    note: str = "",
    bars: Sequence[str] = (),
    headlines: Sequence[tuple[str, str, str, str]] = (),
) -> None:
    """Prints the table and puts it into `extra_info`. `headlines` are (what, ours, peer, ratio) for the README."""
    benchmark.extra_info[KEY] = {
        "name": name,
        "title": title,
        "columns": list(columns),
        "rows": [list(row) for row in rows],
        "unit": unit,
        "note": note,
        "bars": list(bars),
        "headlines": [list(line) for line in headlines],
    }
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    print(f"\n{title}")
    for row in (columns, *rows):
        print(row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)))
    if note:
        print(note)

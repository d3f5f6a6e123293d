"""The published benchmark results, docs/benchmarks/results.json, from which page and README are generated.

A benchmark puts a table into pytest-benchmark's `extra_info` (tests/bench/tables.py). A run of some benchmarks replaces
only their tables, so each table has its own date, machine and command.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from axrun.errors import BadInput

KEY = "table"  # in a benchmark's extra_info


@dataclass(frozen=True)
class Measured:
    """Where and when a table was measured, and the command to repeat it."""

    date: str
    machine: str
    versions: str
    command: str


@dataclass(frozen=True)
class Headline:
    """One line of the README's table: what was measured, ours, the peer's, and how they compare."""

    what: str
    ours: str
    peer: str
    ratio: str


@dataclass(frozen=True)
class Table:
    """One table of docs/benchmarks.md. The first of `columns` names the rows; those in `bars` are plotted."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    measured: Measured
    unit: str = ""
    note: str = ""
    bars: tuple[str, ...] = ()
    headlines: tuple[Headline, ...] = ()

    @classmethod
    def read(cls, name: str, found: Mapping[str, Any], measured: Measured) -> Table:
        """Parses a table. Raises TypeError or KeyError for an invalid one."""
        columns = tuple(map(str, found["columns"]))
        rows = tuple(tuple(map(str, row)) for row in found["rows"])
        if any(len(row) != len(columns) for row in rows) or not set(found.get("bars", ())) <= set(columns[1:]):
            raise TypeError(f"{name}: rows or bars do not fit its columns {columns}")
        return cls(
            name=name,
            title=str(found["title"]),
            columns=columns,
            rows=rows,
            measured=measured,
            unit=str(found.get("unit", "")),
            note=str(found.get("note", "")),
            bars=tuple(found.get("bars", ())),
            headlines=tuple(Headline(*map(str, line)) for line in found.get("headlines", ())),
        )

    def joined(self, more: Table) -> Table:
        """The rows of both tables; the cases of a parametrised benchmark share one table."""
        if (self.columns, self.bars) != (more.columns, more.bars):
            raise TypeError(f"{self.name}: {more.columns} in one case, {self.columns} in another")
        return replace(self, rows=self.rows + more.rows, headlines=self.headlines + more.headlines)


def load(path: Path) -> list[Table]:
    """The tables of results.json; empty without a file. Raises BadInput."""
    if not path.exists():
        return []
    try:
        return [
            Table.read(name, {**found, "headlines": [line.values() for line in found["headlines"]]}, measured)
            for name, found in json.loads(path.read_text("utf-8")).items()
            for measured in [Measured(**found["measured"])]
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise BadInput(f"{path} is not what `make bench REPORT=1` writes: {error}\nTake it from git again.") from None


def save(path: Path, tables: Sequence[Table]) -> None:
    """Writes results.json, sorted by name."""
    ordered = {table.name: {**asdict(table), "name": table.name} for table in sorted(tables, key=lambda t: t.name)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", "utf-8")


def merge(old: Sequence[Table], new: Sequence[Table]) -> list[Table]:
    """The tables of `new`, and those of `old` that `new` lacks."""
    fresh = {table.name for table in new}
    return [*(table for table in old if table.name not in fresh), *new]


def collect(run: Mapping[str, Any], command: str, versions: str) -> list[Table]:
    """The tables in pytest-benchmark's JSON of a run. Raises BadInput without any."""
    info = run["machine_info"]
    cpu = info.get("cpu") or {}
    machine = f"{cpu.get('brand_raw') or info.get('processor') or 'CPU'}, {cpu.get('count', '?')} cores"
    measured = Measured(str(run["datetime"])[:10], machine, versions, command)
    tables: dict[str, Table] = {}
    for seen in run["benchmarks"]:
        if found := seen["extra_info"].get(KEY):
            table = Table.read(str(found["name"]), found, measured)
            first = tables.get(table.name)
            tables[table.name] = first.joined(table) if first else table
    if not tables:
        raise BadInput("no benchmark of this run has a table\nRun others: make bench REPORT=1 ARGS='-k engine'")
    return list(tables.values())

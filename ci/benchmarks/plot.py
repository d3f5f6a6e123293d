"""Plots a benchmark table as horizontal bars, in a deterministic SVG."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from ci.benchmarks.results import Table

COLOURS = ("#1f6feb", "#8b949e", "#d29922", "#2da44e", "#bc4c00")


def number(text: str) -> float | None:
    """The number at the start of a cell such as '1.46x' or '20.9 ms'; None without one."""
    words = text.replace(",", "").split()
    try:
        return float(words[0].rstrip("x%")) if words else None
    except ValueError:
        return None


def draw(table: Table, path: Path) -> None:
    """Draws a group of bars per row, with a bar for each column in `table.bars` that has a number."""
    with mpl.rc_context({"svg.hashsalt": "axc", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}):
        count = len(table.bars)
        figure = Figure(figsize=(7.2, 0.6 + len(table.rows) * (0.16 + 0.17 * count)), layout="constrained")
        axes = figure.subplots()
        for place, name in enumerate(table.bars):
            column = table.columns.index(name)
            cells = [(row, number(cells[column])) for row, cells in enumerate(table.rows)]
            drawn = [
                (row + (place - (count - 1) / 2) * 0.8 / count, value) for row, value in cells if value is not None
            ]
            bars = axes.barh(
                [at for at, _ in drawn],
                [value for _, value in drawn],
                height=0.8 / count,
                color=COLOURS[place % len(COLOURS)],
                label=name,
            )
            axes.bar_label(bars, fmt="%.4g", padding=2, fontsize=7)
        axes.set_yticks(range(len(table.rows)), [row[0] for row in table.rows])
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel(table.unit)
        if count > 1:
            axes.legend(frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})

"""A figure over the nights as a small line chart: where everything goes, in units of the SVG's view box.

Drawn by our own template and not by a plotting library: it takes the page's colours, light or dark, needs no script,
and says each point to a screen reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ci.gate import Gate
from ci.history import Night
from ci.metrics import Metric, number

WIDTH, HEIGHT = 340.0, 150.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 12.0, 12.0, 24.0
NIGHTS = 60  # the last ones
MARGIN = 0.08  # above and below, as a share of what is shown


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    green: bool
    latest: bool
    text: str


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Chart:
    """`line` is the points of a polyline; `band` the gate's top and height, `expected` its middle; None without one."""

    metric: Metric
    points: tuple[Point, ...]
    line: str
    band: tuple[float, float] | None
    expected: float | None
    y_ticks: tuple[Tick, ...]
    x_ticks: tuple[Tick, ...]
    summary: str

    @property
    def width(self) -> float:
        return WIDTH

    @property
    def height(self) -> float:
        return HEIGHT

    @property
    def left(self) -> float:
        return LEFT

    @property
    def right(self) -> float:
        return WIDTH - RIGHT


def draw(metric: Metric, nights: Sequence[Night], gate: Gate | None) -> Chart | None:
    """The last nights that measured the figure; None where none did."""
    shown = [night for night in nights if metric.name in night.figures][-NIGHTS:]
    if not shown:
        return None
    values = [night.figures[metric.name] for night in shown]
    low, high = _range(values, gate)

    def y(value: float) -> float:
        return round(TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    def x(place: int) -> float:
        inner = WIDTH - LEFT - RIGHT
        return round(LEFT + (inner / 2 if len(shown) == 1 else inner * place / (len(shown) - 1)), 1)

    last = len(shown) - 1
    points = tuple(
        Point(
            x(place),
            y(value),
            night.green,
            place == last,
            f"{night.started[:10]}: {metric.text(value)}, night {night.verdict}",
        )
        for place, (night, value) in enumerate(zip(shown, values, strict=True))
    )
    band = None
    if gate is not None:
        top = max(y(gate.most), TOP)
        band = (top, round(min(y(gate.least), HEIGHT - BOTTOM) - top, 1))
    return Chart(
        metric=metric,
        points=points,
        line=" ".join(f"{point.x},{point.y}" for point in points),
        band=band,
        expected=y(gate.expected) if gate is not None else None,
        y_ticks=tuple(Tick(y(value), number(value)) for value in _ticks(low, high)),
        x_ticks=tuple(Tick(x(place), shown[place].started[5:10]) for place in sorted({0, last})),
        summary=(
            f"{metric.label}, {len(shown)} nights from {shown[0].started[:10]} to {shown[-1].started[:10]}: "
            f"least {metric.text(min(values))}, most {metric.text(max(values))}, latest {metric.text(values[-1])}"
        ),
    )


def _range(values: Sequence[float], gate: Gate | None) -> tuple[float, float]:
    """What the axis shows: every value, and the gate."""
    low = min([*values, *([gate.least] if gate else [])])
    high = max([*values, *([gate.most] if gate else [])])
    margin = (high - low) * MARGIN or abs(high) * MARGIN or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float) -> tuple[float, ...]:
    """Bottom, middle and top of what is shown, within the margin."""
    inset = (high - low) * MARGIN / (1 + 2 * MARGIN)
    return low + inset, (low + high) / 2, high - inset

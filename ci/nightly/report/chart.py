"""Layout of a small line chart of a figure over the nights, in units of the SVG's view box.

A template instead of a plotting library: it follows the page's light or dark colours, needs no script, and has a text
for each point for screen readers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ci.nightly.gate import Gate
from ci.nightly.history import Night
from ci.nightly.metrics import Metric, number

WIDTH, HEIGHT = 340.0, 150.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 12.0, 12.0, 24.0
NIGHTS = 60  # most nights in a report's chart
MOST_DIGITS = 5  # extra digits of an axis label
MARGIN = 0.08  # above and below, as a share of the shown range


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
class Step:
    """A segment of the gate band: consecutive nights with the same gate."""

    x: float
    y: float
    width: float
    height: float
    text: str


@dataclass(frozen=True)
class Bounds:
    """The gate of one night: lower and upper bound, and its text."""

    least: float
    most: float
    text: str


@dataclass(frozen=True)
class Chart:
    """`line` is the points of a polyline; `band` the gate's top and height, `expected` its middle, None without a gate.

    Instead of `band`, `steps` may have the bands of each night's own gate. `marks` are targets.
    """

    metric: Metric
    points: tuple[Point, ...]
    line: str
    band: tuple[float, float] | None
    expected: float | None
    y_ticks: tuple[Tick, ...]
    x_ticks: tuple[Tick, ...]
    summary: str
    steps: tuple[Step, ...] = ()
    marks: tuple[Tick, ...] = ()

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
    """The chart of the last nights with the figure; None if there are none."""
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
            _said(metric, night, value),
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
        y_ticks=tuple(Tick(y(value), text) for value, text in _ticks(low, high)),
        x_ticks=tuple(Tick(x(place), shown[place].started[5:10]) for place in sorted({0, last})),
        summary=_summary(metric, shown, values),
    )


def trend(metric: Metric, nights: Sequence[Night], bounds: Sequence[Bounds | None], targets: Sequence[Tick]) -> Chart:
    """The chart of all `nights`, which must have the figure, with each night's own gate.

    `targets` are drawn as lines; their `at` is in the figure's unit.
    """
    values = [night.figures[metric.name] for night in nights]
    held = [entry for entry in bounds if entry is not None]
    shown = [*values, *(edge for entry in held for edge in (entry.least, entry.most)), *(mark.at for mark in targets)]
    low, high = _spread(shown)
    last, latest = len(nights) - 1, nights[-1]
    inner, floor = WIDTH - LEFT - RIGHT, HEIGHT - BOTTOM

    def y(value: float) -> float:
        return round(TOP + (high - value) / (high - low) * (floor - TOP), 1)

    def x(place: float) -> float:
        return round(LEFT + (inner / 2 if last == 0 else inner * min(max(place, 0), last) / last), 1)

    def step(first: int, until: int, held: Bounds) -> Step:
        start, end = (LEFT, WIDTH - RIGHT) if last == 0 else (x(first - 0.5), x(until - 0.5))
        return Step(start, y(held.most), round(end - start, 1), round(y(held.least) - y(held.most), 1), held.text)

    points = (
        Point(x(place), y(value), night.green, night is latest, _said(metric, night, value))
        for place, (night, value) in enumerate(zip(nights, values, strict=True))
    )
    drawn = tuple(points)
    return Chart(
        metric=metric,
        points=drawn,
        line=" ".join(f"{point.x},{point.y}" for point in drawn),
        band=None,
        expected=None,
        y_ticks=tuple(Tick(y(value), text) for value, text in _ticks(low, high)),
        x_ticks=tuple(Tick(x(place), nights[place].started[2:10]) for place in sorted({0, last})),
        summary=_summary(metric, nights, values),
        steps=tuple(step(first, until, held) for first, until, held in _runs(bounds)),
        marks=tuple(Tick(y(mark.at), mark.text) for mark in targets),
    )


def _runs(bounds: Sequence[Bounds | None]) -> Iterator[tuple[int, int, Bounds]]:
    """Runs of nights with the same gate: index of the first, index after the last, the gate."""
    first = 0
    for place in range(1, len(bounds) + 1):
        if place == len(bounds) or bounds[place] != bounds[first]:
            if (held := bounds[first]) is not None:
                yield first, place, held
            first = place


def _said(metric: Metric, night: Night, value: float) -> str:
    return f"{night.started[:10]}: {metric.text(value)}, night {night.verdict}"


def _summary(metric: Metric, nights: Sequence[Night], values: Sequence[float]) -> str:
    return (
        f"{metric.label}, {len(nights)} nights from {nights[0].started[:10]} to {nights[-1].started[:10]}: "
        f"least {metric.text(min(values))}, most {metric.text(max(values))}, latest {metric.text(values[-1])}"
    )


def _range(values: Sequence[float], gate: Gate | None) -> tuple[float, float]:
    """The range of the axis: all values and the gate."""
    return _spread([*values, *([gate.least, gate.most] if gate else [])])


def _spread(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = (high - low) * MARGIN or abs(high) * MARGIN or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float) -> tuple[tuple[float, str], ...]:
    """Tick labels at the bottom, middle and top, with enough digits to differ."""
    inset = (high - low) * MARGIN / (1 + 2 * MARGIN)
    values = low + inset, (low + high) / 2, high - inset
    texts = [number(value) for value in values]
    for more in range(1, MOST_DIGITS):
        if len(set(texts)) == len(texts):
            break
        texts = [number(value, more) for value in values]
    return tuple(zip(values, texts, strict=True))

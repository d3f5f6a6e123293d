"""Temperatures and clocks of a board while something runs on it: read every few seconds, over a connection of its own.

A board without sensors has none; a connection that breaks ends the reading, not the night.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from axrun.errors import Failure
from ci.device.connection import Connection
from ci.device.place import Address, Board
from ci.device.programs import STATE

EVERY_SECONDS = 2.0
SECONDS = 30.0  # for an answer
MOST_READINGS, MOST_SENSORS, MOST_NAME = 20_000, 64, 60
DEGREES, MHZ = (-60.0, 200.0), (0.0, 20_000.0)  # what a sensor may say
HOT = 85.0  # degrees, where the board names no trip point
NEAR = 3.0  # degrees below a trip point
SLOW = 0.98  # of its most MHz, a clock has dropped
NONE = "the board shows no temperatures and no clocks"


@dataclass
class Readings:
    """Values by sensor; `hot` are the degrees from which the kernel acts, `most` the MHz that each clock can have."""

    degrees: dict[str, list[float]] = field(default_factory=dict)
    clocks: dict[str, list[float]] = field(default_factory=dict)
    cooling: dict[str, float] = field(default_factory=dict)
    hot: Mapping[str, float] = field(default_factory=dict)
    most: Mapping[str, float] = field(default_factory=dict)
    governor: str = ""
    why: str = ""  # why there is nothing, or no more
    count: int = 0

    def add(self, answer: Mapping[str, Any]) -> None:
        """One answer of the board; what is no value of a sensor is left out."""
        if self.count >= MOST_READINGS:
            return
        self.count += 1
        for name, value in numbers(answer.get("degrees"), DEGREES).items():
            self._into(self.degrees, name).append(value)
        for name, value in numbers(answer.get("clocks"), MHZ).items():
            self._into(self.clocks, name).append(value)
        for name, value in numbers(answer.get("cooling"), (0.0, 1e6)).items():
            if name in self.cooling or len(self.cooling) < MOST_SENSORS:
                self.cooling[name] = max(value, self.cooling.get(name, 0.0))

    def summary(self) -> dict[str, list[float]]:
        """Least, median and most by sensor, its unit at the end of the name."""
        found = {f"{name}, °C": values for name, values in self.degrees.items()}
        found |= {f"{name}, MHz": values for name, values in self.clocks.items()}
        return {name: [min(values), statistics.median(values), max(values)] for name, values in found.items()}

    def notes(self) -> Iterator[str]:
        """What to know of it: none, too hot, slowed down."""
        if not self.degrees and not self.clocks:
            yield NONE + (f": {self.why}" if self.why else "")
            return
        if self.why:
            yield f"the temperatures were read until {self.why}"
        for name, values in self.degrees.items():
            limit = self.hot.get(name)
            if limit is not None and max(values) >= limit - NEAR:
                yield f"{name} got hot while it measured: {max(values):.1f} °C, the kernel acts at {limit:.0f} °C"
            elif limit is None and max(values) >= HOT:
                yield f"{name} got hot while it measured: {max(values):.1f} °C"
        for name, most in self.most.items():
            values = self.clocks.get(name, [])
            # Other governors slow an idle clock down: of those, only one that never got up has dropped.
            worst = (min if self.governor == "performance" else max)(values, default=most)
            if worst < SLOW * most:
                yield (
                    f"the clock of {name} was {worst:.0f} MHz while it measured, {most:.0f} is its most "
                    f"(governor {self.governor or 'not told'})"
                )
        for name, state in self.cooling.items():
            yield f"cooling device {name} acted while it measured, up to state {state:.0f}"

    def _into(self, table: dict[str, list[float]], name: str) -> list[float]:
        return table.setdefault(name, []) if name in table or len(table) < MOST_SENSORS else []


def numbers(found: Any, bounds: tuple[float, float]) -> dict[str, float]:
    """Of a board's answer, the entries that are a name and a number within bounds."""
    if not isinstance(found, dict):
        return {}
    least, most = bounds
    return {
        "".join(c if c.isprintable() else "�" for c in str(name)[:MOST_NAME]): float(value)
        for name, value in list(found.items())[:MOST_SENSORS]
        if isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most
    }


@contextlib.contextmanager
def reading(
    board: Board,
    at: Address,
    every: float = EVERY_SECONDS,
    connect: Callable[[Board, Address, str], Connection] = Connection,
) -> Iterator[Readings]:
    """Reads the board's sensors until this is closed. Never raises: `why` says what went wrong."""
    found, ended = Readings(), threading.Event()
    thread = threading.Thread(target=_read, args=(found, ended, lambda: connect(board, at, STATE), every), daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join(SECONDS)


def _read(found: Readings, ended: threading.Event, connect: Callable[[], Connection], every: float) -> None:
    try:
        with connect() as link:
            limits = link.call("limits", SECONDS)
            found.hot, found.most = numbers(limits["hot"], DEGREES), numbers(limits["most"], MHZ)
            found.governor = "".join(c if c.isprintable() else "�" for c in limits["governor"][:MOST_NAME])
            while True:
                found.add(link.call("readings", SECONDS))
                if not found.degrees and not found.clocks:
                    return  # there are none: that does not change
                if ended.wait(every):
                    return
    except Failure as failure:
        found.why = str(failure).partition("\n")[0]

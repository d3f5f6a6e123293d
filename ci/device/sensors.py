"""Samples a board's temperatures and clocks every few seconds during a measurement, over a separate connection.

A board may have no sensors. A broken connection ends the sampling, not the night.
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
DEGREES, MHZ = (-60.0, 200.0), (0.0, 20_000.0)  # valid ranges
HOT = 85.0  # degrees, for a board without trip points
NEAR = 3.0  # warn from this many degrees below a trip point
SLOW = 0.98  # a clock below this share of its maximum has dropped
NONE = "the board reports no temperatures and no clocks"


@dataclass
class Readings:
    """Values by sensor; `hot` are the trip points of the kernel in degrees, `most` the maximum clocks in MHz."""

    degrees: dict[str, list[float]] = field(default_factory=dict)
    clocks: dict[str, list[float]] = field(default_factory=dict)
    cooling: dict[str, float] = field(default_factory=dict)
    hot: Mapping[str, float] = field(default_factory=dict)
    most: Mapping[str, float] = field(default_factory=dict)
    governor: str = ""
    why: str = ""  # why the sampling failed or stopped
    count: int = 0

    def add(self, answer: Mapping[str, Any]) -> None:
        """Adds an answer of the board; invalid values are skipped."""
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
        """Minimum, median and maximum by sensor, with the unit at the end of its name."""
        found = {f"{name}, °C": values for name, values in self.degrees.items()}
        found |= {f"{name}, MHz": values for name, values in self.clocks.items()}
        return {name: [min(values), statistics.median(values), max(values)] for name, values in found.items()}

    def notes(self) -> Iterator[str]:
        """Notes for the report: no sensors, too hot, throttled."""
        if not self.degrees and not self.clocks:
            yield NONE + (f": {self.why}" if self.why else "")
            return
        if self.why:
            yield f"the sampling of temperatures stopped: {self.why}"
        for name, values in self.degrees.items():
            limit = self.hot.get(name)
            if limit is not None and max(values) >= limit - NEAR:
                yield f"{name} got hot during the measurement: {max(values):.1f} °C, the kernel acts at {limit:.0f} °C"
            elif limit is None and max(values) >= HOT:
                yield f"{name} got hot during the measurement: {max(values):.1f} °C"
        for name, most in self.most.items():
            values = self.clocks.get(name, [])
            # Other governors lower an idle clock; with them, only a clock that never reached its maximum has dropped.
            worst = (min if self.governor == "performance" else max)(values, default=most)
            if worst < SLOW * most:
                yield (
                    f"the clock of {name} was {worst:.0f} MHz during the measurement, its maximum is {most:.0f} "
                    f"(governor {self.governor or 'unknown'})"
                )
        for name, state in self.cooling.items():
            yield f"cooling device {name} was active during the measurement, up to state {state:.0f}"

    def _into(self, table: dict[str, list[float]], name: str) -> list[float]:
        return table.setdefault(name, []) if name in table or len(table) < MOST_SENSORS else []


def numbers(found: Any, bounds: tuple[float, float]) -> dict[str, float]:
    """The entries of a board's answer that are a number within bounds, with printable names."""
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
    """Samples the board's sensors until the block ends. Never raises; `why` has the error."""
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
                    return  # the board has no sensors
                if ended.wait(every):
                    return
    except Failure as failure:
        found.why = str(failure).partition("\n")[0]

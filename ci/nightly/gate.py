"""Gates: the baseline and tolerance of each figure, in ci/gates/BOARD/MODEL.toml, one table per maker and figure.

A gate has two sides. A figure that is suddenly much better is red too: a broken test often looks like that. If the
improvement is real, record new gates from nights that have it.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from pathlib import Path
from typing import Any

from axrun.errors import BadInput
from ci.device import commands, toml_lines
from ci.device.place import is_emulated
from ci.nightly.metrics import MOST, Figures, Metric, find, is_figure, number, rank

GATES = Path(__file__).resolve().parents[1] / "gates"
MAKERS = ("cpu", "pulsar2")
BASES = ("measured", "published")
MOST_DIGITS = 14  # extra digits: as many as a float has
WIDE = 10  # a tolerance above this multiple of the expected value passes almost anything
FEWEST_NIGHTS = 3  # for a meaningful spread
NAME = re.compile(r"[a-z0-9][a-z0-9._@-]{0,63}")  # of a board or a model variant such as tiny-qwen2@s4


@dataclass(frozen=True)
class Gate:
    """`expected` ± `tolerance`, both in `unit`. `basis` is measured or published, `source` by whom and when."""

    expected: float
    tolerance: float
    unit: str
    basis: str
    source: str

    @property
    def least(self) -> float:
        return self.expected - self.tolerance

    @property
    def most(self) -> float:
        return self.expected + self.tolerance

    @property
    def wide(self) -> bool:
        """Whether it passes almost any value."""
        return bool(self.expected) and self.tolerance > WIDE * abs(self.expected)

    def text(self, more: int = 0) -> str:
        """The gate as text, with `more` digits than usual."""
        return f"{number(self.expected, more)} ± {number(self.tolerance, more)} {self.unit}".strip()

    def digits(self, value: float) -> int:
        """How many extra digits are needed to see on which side of a bound `value` is."""
        inside = self.least <= value <= self.most
        for more in range(MOST_DIGITS):
            seen, middle, around = (Decimal(number(each, more)) for each in (value, self.expected, self.tolerance))
            if (middle - around <= seen <= middle + around) == inside:
                return more
        return MOST_DIGITS


@dataclass(frozen=True)
class Judgement:
    """A figure compared with its gate. `value` is None if not measured, `gate` None if there is none.

    `outcome` is one of OUTCOMES.
    """

    metric: Metric
    value: float | None
    gate: Gate | None
    outcome: str

    @property
    def red(self) -> bool:
        return self.outcome in ("worse", "too good", "not measured")

    @property
    def value_text(self) -> str:
        """The figure as text, with enough digits to see on which side of a bound it is."""
        return "not measured" if self.value is None else self.metric.text(self.value, self._digits)

    @property
    def gate_text(self) -> str:
        """The gate with as many digits as `value_text`; empty if there is none."""
        return self.gate.text(self._digits) if self.gate else ""

    @property
    def _digits(self) -> int:
        return 0 if self.gate is None or self.value is None else self.gate.digits(self.value)

    def reason(self) -> str:
        """Why it is red, for the headline."""
        if self.value is None:
            return f"{self.metric.label} was not measured; its gate expects {self.gate_text}"
        verdict = "worse than its gate" if self.outcome == "worse" else "suspiciously better than its gate"
        return f"{self.metric.label} is {self.value_text}, {verdict} {self.gate_text}"


OUTCOMES = ("within", "worse", "too good", "not measured", "no gate")


def load(board: str, model: str, maker: str, gates: Path = GATES) -> dict[str, Gate]:
    """The gates of a maker's bundles of `model` on `board`, by figure; empty if none are recorded.

    Raises BadInput for an invalid file.
    """
    file = place(board, model, gates)
    return _read(file).get(maker, {}) if os.path.lexists(file) else {}


def place(board: str, model: str, gates: Path = GATES) -> Path:
    """The gate file of a board and a model. Raises BadInput for invalid names."""
    for what, name in (("board", board), ("model", model)):
        if not NAME.fullmatch(name):
            raise BadInput(
                f"{name!a:.60} is not a valid name of a {what}: expected lower-case letters, digits, '.', '_' and '-'"
            )
    return gates / board / f"{model}.toml"


def judge(figures: Figures, gates: Mapping[str, Gate]) -> list[Judgement]:
    """Compares figures with gates; every figure and every gate has a judgement, in the order of METRICS."""
    judged = []
    for name in sorted({*figures, *gates}, key=rank):
        metric, value, gate = find(name), figures.get(name), gates.get(name)
        judged.append(Judgement(metric, value, gate, _outcome(metric, value, gate)))
    return judged


def record(board: str, model: str, maker: str, nights: Sequence[Figures], source: str, gates: Path = GATES) -> Path:
    """Records the gates of a maker from `nights`; those of other makers stay. Returns the file.

    The expected value is the median; the tolerance is twice the spread (maximum - minimum), but at least the metric's
    floor. Skipped: figures that some of the nights lack and, on an emulated board, figures that depend on the host's
    clock. Raises BadInput.
    """
    if len(nights) < FEWEST_NIGHTS:
        raise BadInput(
            f"{len(nights)} measured nights of {model} by {maker} on {board}, expected at least {FEWEST_NIGHTS}\n"
            f"Run more: {commands.invoke('nightly', '--board', board, '--model', model)}"
        )
    names = set.intersection(*(set(night) for night in nights))
    recorded = {}
    for name in sorted(names, key=rank):
        metric, values = find(name), [night[name] for night in nights]
        if not metric.gated or (metric.timed and is_emulated(board)):
            continue
        expected, spread = statistics.median(values), max(values) - min(values)
        tolerance = max(2 * spread, metric.floor * abs(expected))
        text = f"{source}, spread {number(spread)}"
        recorded[name] = Gate(float(f"{expected:.4g}"), _up(tolerance), metric.unit, "measured", text)
    file = place(board, model, gates)
    tables = {**(_read(file) if file.is_file() else {}), maker: recorded}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(_lines(board, model, tables)) + "\n", "utf-8")
    return file


def _outcome(metric: Metric, value: float | None, gate: Gate | None) -> str:
    if gate is None:
        return "no gate"
    if value is None:
        return "not measured"
    if gate.least <= value <= gate.most:
        return "within"
    return "too good" if (value > gate.most) == metric.higher else "worse"


def _read(file: Path) -> dict[str, dict[str, Gate]]:
    text, tables = toml_lines.read(file)
    found: dict[str, dict[str, Gate]] = {}
    for maker, table in tables.items():
        where = f"{file} line {max(toml_lines.line(text, maker), toml_lines.line(text, table=maker))}"
        if maker not in MAKERS:
            raise BadInput(f"{where}: no maker is named {maker!a:.40}: there are {', '.join(MAKERS)}")
        if not isinstance(table, dict):
            raise BadInput(f"{where}: {maker} is {table!a:.40}, expected tables of figures: [{maker}.mean_kld]")
        found[maker] = {}
        for name, entry in table.items():
            try:
                found[maker][name] = _gate(name, entry)
            except BadInput as error:
                raise BadInput(f"{file} line {toml_lines.line(text, table=f'{maker}.{name}')}: {error}") from None
    return found


def _gate(name: str, entry: object) -> Gate:
    """Raises BadInput."""
    metric, keys = find(name), [field.name for field in fields(Gate)]
    if not isinstance(entry, dict) or sorted(entry) != sorted(keys):
        seen = ", ".join(map(str, entry)) if isinstance(entry, dict) else f"{entry!a:.40}"
        raise BadInput(f"{name} has {seen}; expected {', '.join(keys)}")
    for key in ("expected", "tolerance"):
        if not is_figure(entry[key]):
            raise BadInput(f"{name}: {key} is {entry[key]!a:.40}, expected a number within ± {MOST:g}")
    if entry["tolerance"] < 0:
        raise BadInput(f"{name}: tolerance is {entry['tolerance']}, expected 0 or more, in {metric.unit}")
    for key, allowed in (("unit", (metric.unit,)), ("basis", BASES)):
        if entry[key] not in allowed:
            raise BadInput(f"{name}: {key} is {entry[key]!a:.40}, expected {' or '.join(allowed)}")
    if not isinstance(entry["source"], str) or not 0 < len(entry["source"]) <= 500 or not entry["source"].isprintable():
        raise BadInput(f"{name}: source is {entry['source']!a:.40}, expected who measured it and when, in one line")
    return Gate(**{**entry, "expected": float(entry["expected"]), "tolerance": float(entry["tolerance"])})


def _up(value: float) -> float:
    """Three significant digits, rounded up so that the recorded nights stay within the gate."""
    if value == 0:
        return 0.0
    step = 10.0 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.ceil(value / step - 1e-9) * step:.3g}")


def _lines(board: str, model: str, tables: Mapping[str, Mapping[str, Gate]]) -> Iterator[str]:
    yield f"# What {model} must measure on {board}. Recorded by: invoke gate.record --board {board} --model {model}"
    for maker in sorted(tables):
        for name, gate in tables[maker].items():
            yield f"\n[{maker}.{name}]"
            yield from _entries(gate)


def _entries(gate: Gate) -> Iterable[str]:
    values: dict[str, Any] = {field.name: getattr(gate, field.name) for field in fields(Gate)}
    for key, value in values.items():
        # A JSON string is a TOML basic string, except for DEL, which is not printable and therefore not allowed.
        yield f"{key} = {json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)}"

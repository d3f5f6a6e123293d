"""Targets, from ci/targets.toml: goals of the project, or figures published by others, shown next to measurements.

A target is informational; gates decide. A real board's target is never shown with an emulated board's figures, and an
emulated board has none for figures that depend on the host's clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from axrun.errors import BadInput
from ci.device import place, toml_lines
from ci.device.toml_lines import line
from ci.nightly import metrics, variant

FILE = Path(__file__).resolve().parents[1] / "targets.toml"
BASES = ("published", "goal")


@dataclass(frozen=True)
class Target:
    """`value` in `unit`; `basis` is one of BASES, `source` says where the figure is from."""

    board: str
    model: str
    figure: str
    value: float
    unit: str
    basis: str
    source: str

    def text(self) -> str:
        """The value and its basis as text."""
        return f"{metrics.find(self.figure).text(self.value)}, {self.basis}"

    def reached(self, value: float) -> bool:
        return value >= self.value if metrics.find(self.figure).higher else value <= self.value


def read(file: Path = FILE) -> tuple[Target, ...]:
    """Raises BadInput, with the line, for an invalid file."""
    text, content = toml_lines.read(file)
    if unknown := sorted(set(content) - {"target"}):
        raise BadInput(f"{file} line {_line(text, unknown[0])}: {unknown[0]!a:.40} is not known: expected [[target]]")
    tables = content.get("target", [])
    if not isinstance(tables, list) or not all(isinstance(entry, dict) for entry in tables):
        raise BadInput(f"{file} line {_line(text, 'target')}: target is one table, expected [[target]] for each")
    return tuple(_target(file, text, entry, index) for index, entry in enumerate(tables))


def of(targets: Iterable[Target], board: str, model: str) -> dict[str, list[Target]]:
    """The targets of a board and a model, by figure."""
    found: dict[str, list[Target]] = {}
    for target in targets:
        if (target.board, target.model) == (board, model):
            found.setdefault(target.figure, []).append(target)
    return found


def _target(file: Path, text: str, entry: Mapping[str, Any], index: int) -> Target:
    def wrong(key: str, why: str) -> BadInput:
        return BadInput(f"{file} line {line(text, key, table='target', index=index)}: {why}")

    kinds: dict[str, type | tuple[type, ...]] = {field.name: str for field in fields(Target)}
    kinds["value"] = (int, float)
    for key in sorted({*entry, *kinds}, key=lambda name: (name not in entry, name)):
        if key not in kinds:
            raise wrong(key, f"{key!a:.40} is not known: a target has {', '.join(kinds)}")
        if key not in entry:
            raise wrong("", f"this target has no {key}: expected {', '.join(kinds)}")
        if not isinstance(entry[key], kinds[key]) or isinstance(entry[key], bool):
            raise wrong(key, f"{key} is {entry[key]!a:.40}, expected {'a number' if key == 'value' else 'text'}")
    try:
        metric = metrics.find(entry["figure"])
    except BadInput as error:
        raise wrong("figure", str(error)) from None
    try:
        variant.find(entry["model"])
    except BadInput as error:
        raise wrong("model", str(error).partition("\n")[0]) from None
    if not metrics.is_figure(entry["value"]):
        raise wrong("value", f"value is {entry['value']!a:.40}, expected a number within ± {metrics.MOST:g}")
    for key, allowed in (("unit", (metric.unit,)), ("basis", BASES)):
        if entry[key] not in allowed:
            raise wrong(key, f"{key} is {entry[key]!a:.40}, expected {' or '.join(map(repr, allowed))}")
    if not 0 < len(entry["source"]) <= 500 or not entry["source"].isprintable():
        raise wrong("source", "source is not a line of text: expected where the figure is from")
    if place.is_emulated(entry["board"]) and metric.timed:
        raise wrong(
            "figure", f"{entry['board']} is emulated, and {metric.label} depends on the host's clock: no target"
        )
    return Target(**{**entry, "value": float(entry["value"])})


def _line(text: str, name: str) -> int:
    """The line of a key or a table."""
    return max(line(text, name), line(text, table=name))


def nearest(found: Sequence[Target], value: float) -> Target | None:
    """The target to show if there is room for one: the hardest that is reached, else the easiest that is not."""
    if not found:
        return None
    higher = metrics.find(found[0].figure).higher
    easiest_first = sorted(found, key=lambda target: target.value, reverse=not higher)
    reached = [target for target in easiest_first if target.reached(value)]
    return reached[-1] if reached else easiest_first[0]

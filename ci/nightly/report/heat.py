"""The heat map of errors by layer, from the check after the build."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STEPS = 9  # shades
LIGHTEST, DARKEST = 1e-6, 1e-1  # errors with the lightest and the darkest shade
CHANGED = 1.25  # show the last green night's error if it differs by more than this factor
COLUMNS = (("prefill", 0), ("prefill", 1), ("decode", 0), ("decode", 1))
HEADINGS = ("prefill: 1 - cosine", "prefill: worst error", "decode: 1 - cosine", "decode: worst error")

Layers = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Cell:
    """An error, its shade from 0 to STEPS - 1, and the last green night's error if it differed."""

    text: str
    shade: int
    was: str


@dataclass(frozen=True)
class Row:
    """A part of the model; one cell per heading, None if the check has no such figure."""

    part: str
    cells: tuple[Cell | None, ...]


def rows(layers: Layers, before: Layers) -> tuple[Row, ...]:
    """One row per layer, the post model last. `layers` and `before` are Night.layers of ci.nightly.history."""
    parts = sorted({name.rpartition(" ")[0] for name in layers}, key=_place)
    return tuple(Row(part, tuple(_cell(layers, before, part, *column) for column in COLUMNS)) for part in parts)


def _cell(layers: Layers, before: Layers, part: str, stage: str, kind: int) -> Cell | None:
    name = f"{part} {'logits' if part == 'post' else stage}"
    if name not in layers or (part == "post" and stage == "decode"):
        return None
    error = _error(layers[name], kind)
    old = _error(before[name], kind) if name in before else error
    steady = old == error or (min(old, error) > 0 and 1 / CHANGED < error / old < CHANGED)
    return Cell(_text(error), _shade(error), "" if steady else _text(old))


def _error(pair: Sequence[float], kind: int) -> float:
    cosine, worst = pair
    return max(1 - cosine, 0.0) if kind == 0 else worst


def _text(error: float) -> str:
    return f"{error:.1e}" if error else "0"


def _shade(error: float) -> int:
    if error <= LIGHTEST:
        return 0
    share = math.log(error / LIGHTEST) / math.log(DARKEST / LIGHTEST)
    return min(STEPS - 1, int(share * STEPS))


def _place(part: str) -> tuple[int, int, str]:
    number = re.fullmatch(r"layer (\d+)", part)
    return (0, int(number[1]), part) if number else (1, 0, part)

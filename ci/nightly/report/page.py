"""The report of a night: one self-contained HTML page.

The template escapes everything, including texts from the board, logs and commits; the page has no scripts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ci.nightly import metrics
from ci.nightly.board_records import BoardDetails
from ci.nightly.gate import Judgement
from ci.nightly.history import Night
from ci.nightly.report import heat
from ci.nightly.report.changes import Changes
from ci.nightly.report.chart import Chart, draw
from ci.nightly.report.html import environment
from ci.nightly.stage import Stage

MOST_NIGHTS = 30  # in the table at the end


@dataclass(frozen=True)
class Figure:
    """A row of the figures table and its chart; `before` is the last green night's value, `change` the difference."""

    judgement: Judgement
    before: str
    change: str
    chart: Chart | None


@dataclass(frozen=True)
class Page:
    """The content of a report. `nights` are all nights including this one, oldest first.

    `changes` is None if there has been no green night.
    """

    night: Night
    board: str
    headline: str
    advice: str
    stages: Sequence[Stage]
    judgements: Sequence[Judgement]
    nights: Sequence[Night]
    last_green: Night | None
    changes: Changes | None
    notes: Sequence[str]
    artifacts: Sequence[tuple[str, str]]
    board_details: BoardDetails = field(default_factory=BoardDetails)

    @property
    def figures(self) -> list[Figure]:
        before = self.last_green.figures if self.last_green else {}
        return [self._figure(entry, before) for entry in self.judgements]

    def _figure(self, judgement: Judgement, before: Mapping[str, float]) -> Figure:
        metric, value = judgement.metric, judgement.value
        old = before.get(metric.name)
        change = "" if old is None or value is None else _change(old, value)
        chart = draw(metric, [night for night in self.nights if night.maker == self.night.maker], judgement.gate)
        return Figure(judgement, "" if old is None else metric.text(old), change, chart)

    @property
    def accuracy(self) -> list[Figure]:
        return [figure for figure in self.figures if figure.judgement.metric.name in metrics.QUALITY]

    @property
    def speed(self) -> list[Figure]:
        return [figure for figure in self.figures if figure.judgement.metric.name not in metrics.QUALITY]

    @property
    def heat(self) -> tuple[heat.Row, ...]:
        return heat.rows(self.night.layers, self.last_green.layers if self.last_green else {})

    @property
    def earlier(self) -> list[Night]:
        """The last nights, newest first."""
        return list(reversed(self.nights[-MOST_NIGHTS:]))


def _change(old: float, new: float) -> str:
    """The change of a figure: a percentage, or a factor beyond doubling or halving."""
    if new == old:
        return "same"
    ratio = new / old if old else 0.0
    if ratio <= 0:
        return f"{metrics.number(new - old)}"
    return f"{ratio - 1:+.1%}" if 0.5 <= ratio <= 2 else f"x {metrics.number(ratio)}"


def render(page: Page) -> str:
    """The page as HTML."""
    return environment().get_template("page.html.j2").render(page=page, night=page.night)

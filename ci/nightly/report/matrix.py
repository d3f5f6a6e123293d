"""The result of a matrix as an HTML page (boards by models: verdict, key figures, report), as JUnit and as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ci.device.place import Board
from ci.nightly import metrics, targets
from ci.nightly.history import Night
from ci.nightly.matrix import Cell, Matrix
from ci.nightly.matrix_run import CellResult
from ci.nightly.report import state
from ci.nightly.report.html import environment
from ci.nightly.report.state import State
from ci.nightly.targets import Target
from ci.nightly.variant import Variant
from ci.nightly.verdict import GREEN, NOT_HELD, RED

SCHEMA = 1
KEY = ("mean_kld", "top1_agreement", "ttft_128", "decode_128", "engine_instructions", "peak_memory")
MOST_FIGURES = 6  # per cell, red ones first


@dataclass(frozen=True)
class Figure:
    """A figure in a cell as text; `gate` and `target` are empty if there is none."""

    label: str
    value: str
    gate: str
    target: str
    red: bool


@dataclass(frozen=True)
class TableCell:
    """A cell of the table: a night, or an excluded combination (`ran` None)."""

    ran: CellResult | None
    state: State
    reason: str
    advice: str
    remarks: Sequence[str]
    figures: Sequence[Figure]
    report: str


@dataclass(frozen=True)
class Page:
    """The result of a matrix; `folder` is where the page goes, `stopped` names the signal that interrupted it."""

    matrix: Matrix
    ran: Sequence[CellResult]
    started: str
    seconds: float
    folder: Path
    stopped: str = ""

    @property
    def code(self) -> int:
        """The exit code: 1 if something built or measured is wrong, 2 if nights could not run."""
        codes = {ran.code for ran in self.ran}
        return GREEN if codes == {GREEN} else RED if codes - {GREEN, NOT_HELD} else NOT_HELD

    @property
    def word(self) -> str:
        return "red" if self.code else "green"

    @cached_property
    def headline(self) -> str:
        """The verdict in one line."""
        boards = len({ran.cell.board.name for ran in self.ran})
        all_ = f"{len(self.ran)} night{'s' * (len(self.ran) > 1)} on {boards} board{'s' * (boards > 1)}"
        if red := sorted((ran for ran in self.ran if ran.code), key=lambda ran: ran.code != RED):
            more = f" (and {len(red) - 1} more)" if len(red) > 1 else ""
            return f"red: {len(red)} of {all_}: {red[0].headline.removeprefix('red: ')}{more}"
        counts = Counter(_state(ran).word for ran in self.ran)
        well = counts.pop(state.GREEN.word, 0)
        said = [f"{well} within their gates"] if well else []
        return f"green: {all_}: {', '.join([*said, *(f'{count} {word}' for word, count in counts.items())])}"

    @property
    def rows(self) -> list[tuple[Board, list[TableCell]]]:
        return [
            (board, [self.table_cell(board, model) for model in self.matrix.models]) for board in self.matrix.boards
        ]

    def table_cell(self, board: Board, model: Variant) -> TableCell:
        ran = self._by_cell.get(Cell(board, model))
        if ran is None:
            reason = self.matrix.excluded.get((board.name, model.name), "")
            return TableCell(None, state.EXCLUDED, reason, "", (), (), "")
        found = ran.summary
        if found is None:
            return TableCell(ran, state.NOT_HELD, ran.reason, "", (), (), "")
        report = self._link(ran)
        remarks = [*state.remarks(_night(ran)), *found.notes]
        return TableCell(ran, _state(ran), _plain(ran), found.advice, remarks, list(self.figures(ran)), report)

    def figures(self, ran: CellResult) -> Iterator[Figure]:
        """The red figures, then the key figures; for an emulated board without those of the host's clock."""
        if ran.summary is None:
            return
        goals = targets.of(self.matrix.targets, ran.cell.board.name, ran.cell.model.name)
        red = [entry for entry in ran.summary.judged if entry.outcome in ("worse", "too good", "not measured")]
        usual = [entry for name in KEY for entry in ran.summary.judged if entry.figure == name and entry not in red]
        emulated = ran.cell.board.emulated
        usual = [entry for entry in usual if not (emulated and metrics.find(entry.figure).timed)]
        for entry in [*red, *usual][: max(MOST_FIGURES, len(red))]:
            value = ran.summary.night["figures"].get(entry.figure)
            goal = targets.nearest(goals.get(entry.figure, ()), value) if value is not None else None
            label = metrics.find(entry.figure).label
            yield Figure(label, entry.value, entry.gate, _said(goal, value), entry in red)

    def lines(self) -> Iterator[str]:
        """The result in lines for a console, the headline first."""
        yield self.headline
        for ran in self.ran:
            found = _state(ran)
            yield f"  {found.mark} {ran.cell.name}: {found.word}{f': {_plain(ran)}' if ran.reason else ''}"
        for (board, model), why in self.matrix.excluded.items():
            yield f"  {state.EXCLUDED.mark} {model} on {board}: excluded: {why}"
        yield f"  page: {self.folder / 'matrix.html'}"

    def write(self) -> None:
        """Writes matrix.html, junit.xml and matrix.json to the folder."""
        html = environment().get_template("matrix.html.j2").render(page=self)
        (self.folder / "matrix.html").write_text(html, "utf-8")
        ElementTree.ElementTree(self.junit()).write(self.folder / "junit.xml", "utf-8", xml_declaration=True)
        (self.folder / "matrix.json").write_text(json.dumps(self.data(), indent=1, sort_keys=True) + "\n", "utf-8")

    def junit(self) -> ElementTree.Element:
        """JUnit results: a suite for each board, a case for each night."""
        top = ElementTree.Element("testsuites", name="matrix")
        for board, row in self.rows:
            held = [each.ran for each in row if each.ran]
            counts = {
                "tests": len(row),
                "failures": sum(ran.code == RED for ran in held),
                "errors": sum(ran.code not in (GREEN, RED) for ran in held),
                "skipped": len(row) - len(held),
            }
            suite = ElementTree.SubElement(top, "testsuite", name=_xml(board.title))
            for name, count in counts.items():
                suite.set(name, str(count))
            for model, table_cell in zip(self.matrix.models, row, strict=True):
                seconds = f"{table_cell.ran.seconds if table_cell.ran else 0.0:.1f}"
                case = ElementTree.SubElement(suite, "testcase", classname=board.name, name=model.name, time=seconds)
                if table_cell.ran is None:
                    ElementTree.SubElement(case, "skipped", message=_xml(f"excluded: {table_cell.reason}"))
                elif table_cell.ran.code:
                    kind = "failure" if table_cell.ran.code == RED else "error"
                    ElementTree.SubElement(case, kind, message=_xml(table_cell.reason)).text = _xml(table_cell.advice)
                said = [table_cell.state.word, *table_cell.remarks]
                ElementTree.SubElement(case, "system-out").text = _xml("\n".join(said))
        return top

    def data(self) -> dict[str, Any]:
        """The content of matrix.json."""
        return {
            "schema": SCHEMA,
            "verdict": self.word,
            "headline": self.headline,
            "started": self.started,
            "nights": [
                {
                    "board": ran.cell.board.name,
                    "model": ran.cell.model.name,
                    "state": _state(ran).word,
                    "code": ran.code,
                    "reason": ran.reason,
                    "figures": dict(ran.summary.night["figures"]) if ran.summary else {},
                    "report": self._link(ran) or None,
                }
                for ran in self.ran
            ],
            "excluded": [
                {"board": board, "model": model, "reason": why} for (board, model), why in self.matrix.excluded.items()
            ],
        }

    def _link(self, ran: CellResult) -> str:
        """The link to the night's report, relative to the page; empty if there is none."""
        report = ran.summary.report if ran.summary else ""
        return os.path.relpath(report, self.folder) if report else ""

    @cached_property
    def _by_cell(self) -> dict[Cell, CellResult]:
        return {ran.cell: ran for ran in self.ran}


def _state(ran: CellResult) -> State:
    return state.of(_night(ran)) if ran.summary else state.NOT_HELD


def _plain(ran: CellResult) -> str:
    """The reason without the words that the state already shows."""
    return ran.reason.removeprefix(f"{_state(ran).word}: ")


def _night(ran: CellResult) -> Night:
    """The night of a summary; unknown fields are ignored."""
    assert ran.summary is not None
    known = {entry.name for entry in dataclasses.fields(Night)}
    return Night(**{name: value for name, value in ran.summary.night.items() if name in known})


def _said(goal: Target | None, value: float | None) -> str:
    if goal is None or value is None:
        return ""
    return f"target {goal.text()}: {'reached' if goal.reached(value) else 'not reached'}"


def _xml(text: str) -> str:
    """The text without characters that XML does not allow."""
    return "".join(c if c in "\n\t" or c.isprintable() else "�" for c in text)

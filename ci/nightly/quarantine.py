"""Quarantine: known failures with an owner and an end date. Until then they are reported but do not turn a night red.

ci/quarantine.toml has one entry each; preflight refuses incomplete ones:

    [[quarantine]]
    board = "ax650"
    model = "qwen2-0.5b"
    figure = "decode_128"       # or stage = "count", or test = "test_texts_are_tokenised_like_the_checkpoint"
    owner = "jane"
    reason = "the fan of shelf 3 is broken, a new one is ordered"
    until = 2026-12-24
"""

from __future__ import annotations

import ast
import datetime
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from axrun.errors import BadInput
from ci.device import doctor, place, toml_lines
from ci.nightly import board_records, gate, metrics
from ci.nightly.gate import NAME, Judgement
from ci.nightly.junit import Case
from ci.nightly.pipeline import LIMITS, MEASURE
from ci.nightly.stage import Stage
from ci.nightly.verdict import Verdict

FILE = Path(__file__).resolve().parents[1] / "quarantine.toml"
TESTS = Path(__file__).resolve().parents[2] / "tests" / "hil"
MOST_DAYS = 60
KINDS = ("figure", "test", "stage")
TEXTS = ("owner", "reason")
# stages that are not quarantined, and why
NEVER = {
    MEASURE: 'it covers all figures and tests; name the red one: figure = "...", test = "..."',
    board_records.HEALTH: "measurements on an unhealthy board mean nothing; repair the board, or exclude it",
    doctor.STAGE: "it never turns a night red",
}
EXCUSED = "quarantined"  # the outcome of a stage and of a figure


@dataclass(frozen=True)
class Entry:
    """One quarantined item: `kind` is one of KINDS, `name` its name, `until` the last day."""

    board: str
    model: str
    kind: str
    name: str
    owner: str
    reason: str
    until: datetime.date

    @property
    def key(self) -> str:
        return f"{self.kind} {self.name}"

    @property
    def what(self) -> str:
        """The item with its model and board."""
        return f"{self.key} of {self.model} on {self.board}"

    @property
    def label(self) -> str:
        """The item as reports name it."""
        return metrics.find(self.name).label if self.kind == "figure" else self.key

    @property
    def text(self) -> str:
        return f"until {self.until}, {self.owner}: {self.reason}"


@dataclass(frozen=True)
class Quarantine:
    """The entries of a board and a model: those in force today, and those that expired."""

    entries: tuple[Entry, ...] = ()
    ended: tuple[Entry, ...] = ()

    def names(self, kind: str) -> dict[str, Entry]:
        return {entry.name: entry for entry in self.entries if entry.kind == kind}

    def notes(self) -> Iterator[str]:
        for entry in self.ended:
            yield (
                f"the quarantine of {entry.label} expired on {entry.until} ({entry.owner}: {entry.reason}): it counts "
                f"again; remove the entry from {FILE.name}"
            )


NONE = Quarantine()


@dataclass(frozen=True)
class Excused:
    """The input of a verdict without quarantined failures; `held` has those that were red, by Entry.key."""

    stages: Sequence[Stage]
    judged: Sequence[Judgement]
    tests: Sequence[str]
    held: Mapping[str, Entry] = field(default_factory=dict)
    healthy: Sequence[Entry] = ()

    def verdict(self, found: Verdict) -> Verdict:
        """The verdict; a night that ended in a quarantined stage before measuring is not judged."""
        ended = next((done for done in self.stages if done.excused == EXCUSED and done.name != MEASURE), None)
        if ended is None or not found.code or self.judged or any(done.failed for done in self.stages):
            return found
        return Verdict(f"recorded, not judged: stage {ended.name} is quarantined, and nothing was measured")

    def headline(self) -> str:
        """The suffix of a headline; empty if nothing was excused."""
        if not self.held:
            return ""
        told = ", ".join(f"{entry.label} until {entry.until} ({entry.owner})" for entry in self.held.values())
        return f"; quarantined: {told}"

    def notes(self) -> Iterator[str]:
        for entry in self.held.values():
            yield f"{entry.label} is red and quarantined {entry.text}"
        for entry in self.healthy:
            yield f"{entry.label} is quarantined {entry.text}, but it passed: remove the entry from {FILE.name}"

    def record(self) -> dict[str, str]:
        return {key: entry.text for key, entry in self.held.items()}


def load(
    board: str,
    model: str,
    models: Sequence[str],
    boards: Sequence[str],
    file: Path = FILE,
    gates: Path = gate.GATES,
    today: datetime.date | None = None,
) -> Quarantine:
    """The quarantine of a board and a model; empty if there is no file.

    Raises BadInput for an entry (of any board) that is incomplete, matches nothing or lasts too long.
    """
    now = today or datetime.datetime.now(datetime.UTC).date()
    entries: list[Entry] = []
    text, content = toml_lines.read(file) if os.path.lexists(file) else ("", {})
    for index, table in enumerate(_tables(file, content)):
        try:
            entry = _entry(table)
            _require(entry, now, models, boards, gates)
            if entry.what in [other.what for other in entries]:
                raise BadInput(f"{entry.what} is quarantined twice: keep one")
        except BadInput as error:
            line = toml_lines.line(text, table="quarantine", index=index)
            raise BadInput(f"{file} line {line}: {error}") from None
        entries.append(entry)
    ours = [entry for entry in entries if (entry.board, entry.model) == (board, model)]
    return Quarantine(
        tuple(entry for entry in ours if entry.until >= now), tuple(entry for entry in ours if entry.until < now)
    )


def excuse(found: Quarantine, stages: Sequence[Stage], judged: Sequence[Judgement], cases: Sequence[Case]) -> Excused:
    """Removes quarantined failures from the input of a night's verdict."""
    figures, tests, named = found.names("figure"), found.names("test"), found.names("stage")
    messages = [message for case in cases for message in case.messages]
    if not found.entries:
        return Excused(stages, judged, messages)
    held: dict[str, Entry] = {}
    reasons = []
    left = []
    for entry in judged:
        quarantined = figures.get(entry.metric.name) if entry.red else None
        if quarantined:
            held[quarantined.key] = quarantined
            reasons.append(entry.reason())
            entry = replace(entry, outcome=EXCUSED)
        left.append(entry)
    counted = []
    for case in cases:
        if case.messages and case.test in tests:
            held[tests[case.test].key] = tests[case.test]
        else:
            counted += [message for message in case.messages if not message.startswith(tuple(reasons) or ("\0",))]
    explained = messages and not counted and not any(entry.red for entry in left)
    kept = []
    for done in stages:
        if done.failed and done.name in named:
            held[named[done.name].key] = named[done.name]
            done = replace(done, excused=EXCUSED)
        elif done.failed and done.name == MEASURE and done.outcome == "failed" and explained:
            done = replace(done, excused=EXCUSED)
        kept.append(done)
    healthy = [entry for entry in found.entries if entry.key not in held and _is_healthy(entry, stages, judged, cases)]
    return Excused(kept, left, counted, held, healthy)


def _is_healthy(entry: Entry, stages: Sequence[Stage], judged: Sequence[Judgement], cases: Sequence[Case]) -> bool:
    """Whether the item passed in this night; False if the night ended before reaching it."""
    if entry.kind == "figure":
        return any(one.metric.name == entry.name and one.outcome == "within" for one in judged)
    if entry.kind == "test":
        mine = [case for case in cases if case.test == entry.name]
        return bool(mine) and all(case.ran for case in mine)
    return any(done.name == entry.name and done.code == 0 for done in stages)


def _tables(file: Path, content: Mapping[str, Any]) -> list[object]:
    tables = content.get("quarantine", [])
    other = ", ".join(ascii(key)[:40] for key in content if key != "quarantine")
    if other or not isinstance(tables, list):
        raise BadInput(f"{file}: it has {other or 'no list'}; expected entries: [[quarantine]]")
    return tables


def _entry(table: object) -> Entry:
    if not isinstance(table, dict):
        raise BadInput(f"the entry is {table!a:.40}, expected a table: [[quarantine]]")
    kinds = [kind for kind in KINDS if kind in table]
    wanted = {"board", "model", "until", *TEXTS}
    if missing := sorted(wanted - table.keys()):
        raise BadInput(f"the entry has no {' and no '.join(missing)}; it needs {', '.join(sorted(wanted))}")
    if len(kinds) != 1 or table.keys() - wanted - {*KINDS}:
        raise BadInput(
            f"the entry has {', '.join(sorted(table))}; expected one of {', '.join(KINDS)} beside the others"
        )
    for key in ("board", "model", kinds[0], *TEXTS):
        value = table[key]
        if not isinstance(value, str) or not 0 < len(value.strip()) <= 300 or not value.isprintable():
            raise BadInput(f"{key} is {value!a:.40}, expected one line of text")
    if type(table["until"]) is not datetime.date:
        raise BadInput(f"until is {table['until']!a:.40}, expected a date: 2026-12-24")
    return Entry(kind=kinds[0], name=table[kinds[0]], **{key: table[key] for key in wanted})


def _require(entry: Entry, today: datetime.date, models: Sequence[str], boards: Sequence[str], gates: Path) -> None:
    """Raises BadInput for an entry that matches nothing or lasts too long."""
    where = entry.what
    if (entry.until - today).days > MOST_DAYS:
        raise BadInput(
            f"{where} ends on {entry.until}, in {(entry.until - today).days} days; at most {MOST_DAYS}\n"
            "A quarantine is for failures that will be fixed: set an earlier date, or remove the gate."
        )
    for what, name, known in (("board", entry.board, boards), ("model", entry.model, models)):
        if name.partition("@")[0] not in known:
            raise BadInput(f"{where} matches nothing: no {what} is named {name!a}; there are {', '.join(known)}")
    if entry.kind == "stage":
        _require_stage(entry)
    if entry.kind == "test" and entry.name not in (known := sorted(_tests())):
        raise BadInput(f"{where} matches nothing: tests/hil has {', '.join(known)}")
    if entry.kind == "figure" and entry.until >= today and NAME.fullmatch(entry.model):
        metrics.find(entry.name)
        found = {name for maker in gate.MAKERS for name in gate.load(entry.board, entry.model, maker, gates)}
        judged = sorted(found, key=metrics.rank)
        if entry.name not in judged:
            raise BadInput(f"{where} matches nothing: no gate judges it; there are {', '.join(judged) or 'none'}")


def _require_stage(entry: Entry) -> None:
    """Raises BadInput for an unknown stage, and for one that must not be quarantined."""
    if entry.name not in LIMITS:
        raise BadInput(f"{entry.what} matches nothing: the stages are {', '.join(LIMITS)}")
    if entry.name in NEVER:
        raise BadInput(f"{entry.what} cannot be quarantined: {NEVER[entry.name]}")
    if entry.name == "count" and not place.is_emulated(entry.board):
        raise BadInput(f"{entry.what} matches nothing: instructions are counted only for emulated boards")


def _tests() -> Iterator[str]:
    for file in sorted(TESTS.glob("test_*.py")):
        for found in ast.parse(file.read_text("utf-8")).body:
            if isinstance(found, ast.FunctionDef) and found.name.startswith("test_"):
                yield found.name

"""The static site over a history folder: an index, a page for each board and model, badges, a JSON feed.

No scripts, no network, relative links: it opens from a disk and from any folder of a web server. Its bytes depend only
on the history and the reports. The history is not trusted: everything is escaped.
"""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from axrun.errors import BadInput
from ci.device import place, strict_json
from ci.nightly import history, metrics, targets
from ci.nightly.gate import NAME
from ci.nightly.history import Night
from ci.nightly.metrics import Metric
from ci.nightly.report import badge, changes, chart, state
from ci.nightly.report.chart import Bounds, Chart, Tick
from ci.nightly.report.html import environment
from ci.nightly.report.state import State
from ci.nightly.targets import Target

SCHEMA = 1
RECORD = ".site.json"  # the list of the files that the site wrote
KEY = ("mean_kld", "decode_128", "ttft_128", "engine_instructions", "peak_memory")  # candidates for the index
MOST_KEY = 3  # charts on the index, for each board and model
LARGEST_REPORT = 1 << 24  # bytes; larger ones are not copied
GATE = re.compile(r"(\S+) ± (\S+)(?: |$)")
IN_FEED = (
    "started",
    "seconds",
    "verdict",
    "reason",
    "stage",
    "commit",
    "maker",
    "engine",
    "release",
    "figures",
    "gates",
)


@dataclass(frozen=True)
class Row:
    """A night on the page of its board and model; `report` is a link, empty if the report no longer exists."""

    night: Night
    state: State
    reason: str
    remarks: Sequence[str]
    report: str
    others: Sequence[tuple[str, str, str]]  # changes of requirements, board and engine since the night before


@dataclass(frozen=True)
class TargetRow:
    """A target and the last measurement of its figure; `measured` is empty if there is none."""

    target: Target
    metric: Metric
    board: str
    link: str
    measured: str
    basis: str
    reached: bool | None


@dataclass(frozen=True)
class Series:
    """All nights of a board and a model. `reports` maps the start time of a night to its report."""

    board: str
    model: str
    nights: tuple[Night, ...]
    faults: tuple[str, ...]
    targets: Mapping[str, Sequence[Target]]
    reports: Mapping[str, Path]

    @property
    def emulated(self) -> bool:
        return place.is_emulated(self.board)

    @property
    def title(self) -> str:
        return f"{self.board} (emulated)" if self.emulated else self.board

    @property
    def page(self) -> str:
        return f"{self.board}/{self.model}.html"

    @property
    def badge(self) -> str:
        return f"badges/{self.board}/{self.model}.svg"

    @property
    def last(self) -> Night | None:
        return self.nights[-1] if self.nights else None

    @property
    def state(self) -> State:
        return state.of(self.last) if self.last else state.NOT_HELD

    @property
    def reason(self) -> str:
        return state.reason(self.last) if self.last else ""

    @property
    def streak(self) -> str:
        """For example `green for 12 nights`."""
        if self.last is None:
            return "no night could be read"
        word, count = state.streak(self.nights)
        return f"{word} for {count} night{'s' if count > 1 else ''}"

    @property
    def last_green(self) -> Night | None:
        return history.last_green(self.nights)

    @property
    def makers(self) -> list[str]:
        """The makers of the measured axmodels, the latest first."""
        seen = (night.maker for night in reversed(self.nights) if night.figures)
        return list(dict.fromkeys(seen))

    def measured(self, figure: str) -> Night | None:
        """The last night that measured a figure."""
        return next((night for night in reversed(self.nights) if figure in night.figures), None)

    def charts(self, maker: str, *, timed: bool | None = None) -> list[Chart]:
        """Charts of all figures of a maker; with `timed`, only of those that depend on a clock (True) or do not."""
        names = {name for night in self.nights if night.maker == maker for name in night.figures}
        found = (self.chart(maker, name) for name in sorted(names, key=metrics.rank))
        return [drawn for drawn in found if drawn and timed in (None, drawn.metric.timed)]

    def chart(self, maker: str, name: str) -> Chart | None:
        metric = metrics.find(name)
        nights = [
            night
            for night in self.nights
            if night.maker == maker and name in night.figures and abs(night.figures[name]) < metrics.MOST
        ]
        if not nights:
            return None
        marks = [
            Tick(target.value, f"{target.text()}: {target.source}")
            for target in self.targets.get(name, ())
            if not _is_outlier(target.value, [night.figures[name] for night in nights])
        ]
        return chart.trend(metric, nights, [bounds(night.gates.get(name, "")) for night in nights], marks)

    def key_charts(self) -> list[Chart]:
        """The charts for the index; for an emulated board without those of the host's clock."""
        if not self.makers:
            return []
        drawn = (self.chart(self.makers[0], name) for name in KEY)
        kept = [each for each in drawn if each and not (self.emulated and each.metric.timed)]
        return kept[:MOST_KEY]

    @cached_property
    def rows(self) -> list[Row]:
        """Newest first."""
        found, before = [], None
        for night in self.nights:
            others = changes.others(before, night) if before else ()
            found.append(
                Row(
                    night,
                    state.of(night),
                    state.reason(night),
                    state.remarks(night),
                    self.report(night),
                    _listed(others),
                )
            )
            before = night if night.pins or night.machine else before
        return found[::-1]

    def report(self, night: Night) -> str:
        """The copy of a night's report, from the root of the site."""
        return f"reports/{self.board}/{self.model}/{stamp(night)}.html" if stamp(night) in self.reports else ""

    def target_rows(self) -> Iterator[TargetRow]:
        """Every target with its last measurement."""
        for name, found in sorted(self.targets.items(), key=lambda item: metrics.rank(item[0])):
            night = self.measured(name)
            for target in found:
                metric = metrics.find(name)
                value = night.figures[name] if night else None
                where = "emulated board" if self.emulated else "board"
                basis = f"measured on the {where}, {night.maker} bundle, {night.started[:10]}" if night else ""
                yield TargetRow(
                    target,
                    metric,
                    self.title,
                    self.page if self.nights or self.faults else "",
                    "" if value is None else metric.text(value),
                    basis,
                    None if value is None else target.reached(value),
                )


@dataclass(frozen=True)
class Site:
    """`series` are sorted by board and model; `targets_only` are those with targets but no nights."""

    series: tuple[Series, ...]
    targets_only: tuple[Series, ...]

    @property
    def red(self) -> list[Series]:
        return [series for series in self.series if series.state.tone == "bad"]

    @property
    def headline(self) -> str:
        if not self.series:
            return "no nights yet"
        count = len(self.series)
        each = f"{count} board{'s' if count > 1 else ''} and model{'s' if count > 1 else ''}"
        if self.red:
            first, more = self.red[0], f" (and {len(self.red) - 1} more)" if len(self.red) > 1 else ""
            why = f": {first.reason}" if first.reason else ""
            return f"red: {len(self.red)} of {each}: {first.model} on {first.title}{why}{more}"
        only = f"{self.series[0].model} on {self.series[0].title}"
        return f"green: the last night of {only if count == 1 else f'each of {each}'}"

    @property
    def word(self) -> str:
        return "soft" if not self.series else "red" if self.red else "green"

    @property
    def latest(self) -> str:
        return max((series.last.started for series in self.series if series.last), default="")

    def target_rows(self) -> list[TargetRow]:
        return list(
            itertools.chain.from_iterable(series.target_rows() for series in (*self.series, *self.targets_only))
        )


def collect(folder: Path, reports: Path | None = None, goals: Sequence[Target] = ()) -> Site:
    """The site of a history folder. Raises BadInput for a missing or unreadable folder.

    `reports` is the folder of the nights' reports (OUT/nightly); existing ones are linked.
    """
    if not folder.is_dir():
        raise BadInput(f"no history in {folder}: name the folder given to the nights with --history")
    series = []
    for file in sorted(folder.glob("*/*.jsonl")):
        board, model = file.parent.name, file.stem
        if NAME.fullmatch(board) and NAME.fullmatch(model):
            found = history.read(folder, board, model)
            if found.nights or found.faults:
                pages = _pages(reports / board / "nights" / model) if reports else {}
                series.append(Series(board, model, found.nights, found.faults, targets.of(goals, board, model), pages))
    told = {(series.board, series.model) for series in series}
    rest = sorted({(goal.board, goal.model) for goal in goals} - told)
    targets_only = tuple(Series(board, model, (), (), targets.of(goals, board, model), {}) for board, model in rest)
    return Site(tuple(series), targets_only)


def write(site: Site, out: Path) -> Path:
    """Writes the changed files of the site to `out` and removes its obsolete ones. Returns the index.

    Raises BadInput for a folder with foreign files.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        record = out / RECORD
        if not record.is_file() and (there := sorted(path.name for path in out.iterdir() if path.name != ".lock")):
            raise BadInput(f"{out} has files that are not the site's ({there[0]}): use a separate folder")
        with (out / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = _ours(record)
            made = dict(_files(site))
            record.write_text(json.dumps(sorted({*before, *made})) + "\n")  # in case of an interruption
            for name, data in made.items():
                _put(out / name, data)
            for name in sorted(before - set(made)):
                (out / name).unlink(missing_ok=True)
            record.write_text(json.dumps(sorted(made)) + "\n")
    except OSError as error:
        raise BadInput(f"cannot write the site in {out}: {error.strerror or error}") from None
    return out / "index.html"


def bounds(text: str) -> Bounds | None:
    """Parses the gate text of a history line, `20 ± 4 token/s`; None for anything else."""
    found = GATE.match(text)
    try:
        expected, tolerance = (float(part) for part in found.groups()) if found else (0.0, -1.0)
    except ValueError:
        return None
    if not (abs(expected) < metrics.MOST and 0 <= tolerance < metrics.MOST):
        return None
    return Bounds(expected - tolerance, expected + tolerance, f"gate {text}")


def stamp(night: Night) -> str:
    """The name of the folder of a night's report, from its start time."""
    return re.sub("[-:]", "", night.started)


def _files(site: Site) -> Iterator[tuple[str, bytes]]:
    """The path and the bytes of every file of the site."""
    made = environment()
    yield "index.html", made.get_template("site.html.j2").render(site=site).encode()
    for series in site.series:
        yield series.page, made.get_template("series.html.j2").render(series=series, root="../").encode()
        yield series.badge, badge.svg(f"{series.model} on {series.title}", series.streak, series.state.tone).encode()
        for night in series.nights:
            if link := series.report(night):
                yield link, series.reports[stamp(night)].read_bytes()
    tone = "soft" if not site.series else "bad" if site.red else "good"
    word = "no nights" if not site.series else f"{len(site.red)} of {len(site.series)} red" if site.red else "green"
    yield "badge.svg", badge.svg("nightly", word, tone).encode()
    yield "nights.json", (json.dumps(_feed(site), allow_nan=False, indent=1, sort_keys=True) + "\n").encode()


def _feed(site: Site) -> dict[str, Any]:
    """The content of nights.json: the nights without the details that only the history has."""
    return {
        "schema": SCHEMA,
        "verdict": "none" if not site.series else "red" if site.red else "green",
        "boards": [
            {
                "board": series.board,
                "model": series.model,
                "emulated": series.emulated,
                "state": series.state.word,
                "streak": state.streak(series.nights)[1] if series.nights else 0,
                "last_green": series.last_green.started if series.last_green else None,
                "page": series.page,
                "badge": series.badge,
                "not_read": list(series.faults),
                "targets": [
                    dataclasses.asdict(each) for name in sorted(series.targets) for each in series.targets[name]
                ],
                "nights": [
                    {
                        **{name: getattr(night, name) for name in IN_FEED},
                        "state": state.of(night).word,
                        "remarks": state.remarks(night),
                        "report": series.report(night) or None,
                    }
                    for night in series.nights
                ],
            }
            for series in site.series
        ],
    }


def _pages(folder: Path) -> dict[str, Path]:
    """The existing reports by the name of their night; symlinks and huge files are skipped."""
    found = {}
    for page in sorted(folder.glob("*/report.html")):
        if not page.is_symlink() and page.stat().st_size <= LARGEST_REPORT:
            found[page.parent.name] = page
    return found


def _ours(record: Path) -> set[str]:
    """The files written last time; names that could lead out of the folder are ignored."""
    try:
        names = strict_json.loads(record.read_text("utf-8"))
    except (OSError, ValueError):
        return set()
    kept = re.compile(r"[\w@-][\w.@-]*(/[\w@-][\w.@-]*){0,3}")
    return (
        {name for name in names if isinstance(name, str) and kept.fullmatch(name)} if isinstance(names, list) else set()
    )


def _put(file: Path, data: bytes) -> None:
    if file.is_file() and file.read_bytes() == data:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    part.write_bytes(data)
    part.replace(file)


def _listed(others: Sequence[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    return [(what, was, new) for what, was, new in others if what != "bundle"]


def _is_outlier(value: float, measured: Sequence[float]) -> bool:
    """Whether a target is so far off that its line would flatten the chart."""
    middle = statistics.median(measured)
    return not 0.2 * middle <= value <= 5 * middle

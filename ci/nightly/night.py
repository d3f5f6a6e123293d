"""One nightly run (a night) on one board: reserve, power on, build, deploy, measure, judge, report.

However it ends (failure, timeout, Ctrl-C, SIGTERM), the board is switched off and released, no process is left running,
and a report and a line of history are written.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from axrun.errors import BadInput, Failure
from axrun.format.bundle import MANIFEST, read_manifest, sha256
from ci.device import commands, doctor, evidence, place, strict_json
from ci.device.place import Board
from ci.nightly import (
    bisection,
    board_records,
    checkout,
    gate,
    history,
    junit,
    metrics,
    notify,
    preflight,
    quarantine,
    retry,
    run_folder,
    stage,
    variant,
)
from ci.nightly.gate import Judgement
from ci.nightly.history import History, Night
from ci.nightly.pipeline import DEPLOYED, INSTRUCTIONS, MEASURE, Interrupted, Options, Pipeline, StageFailed
from ci.nightly.preflight import Plan
from ci.nightly.report import changes
from ci.nightly.report.page import Page, render
from ci.nightly.stage import Stage
from ci.nightly.variant import Variant
from ci.nightly.verdict import Verdict, drifts, verdict

ROOT = Path(__file__).resolve().parents[2]
KEPT_NIGHTS = 30  # folders of reports
MOST_TEXT = 200  # characters of a text that the board reports
ARTIFACTS = {
    "junit.xml": "results of the board tests, for a CI system",
    "benchmark.json": "times on the board, in pytest-benchmark's format",
    "figures.json": "output of axrun eval and axrun bench on the board",
    "deployed.json": "record of the deploy: sha256 of every file",
    "check.json": "per-layer errors of the check after the build",
    doctor.FILE: "diagnosis of the doctor, on this machine and on the board",
    **board_records.ARTIFACTS,
}

PYTHON = ("program", "version", "program_sha256")  # keys of the evidence that go into the history

Say = Callable[[str], None]


@dataclass(frozen=True)
class NightResult:
    """A finished night."""

    headline: str
    verdict: Verdict
    stages: tuple[Stage, ...]
    judged: tuple[Judgement, ...]
    report: Path
    night: Night
    notes: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        """The result in lines for a console, the headline first."""
        yield self.headline
        if self.verdict.advice:
            yield f"  {self.verdict.advice}"
        for entry in self.judged:
            value = "-" if entry.value is None else entry.value_text
            bounds = f"gate {entry.gate_text}" if entry.gate else ""
            yield f"  {entry.metric.label:<48}{value:<18}{entry.outcome:<14}{bounds}".rstrip()
        yield from (f"  {note}" for note in self.notes)
        yield f"  {', '.join(f'{entry.name} {entry.seconds:.1f} s' for entry in self.stages)}"
        yield f"  report: {self.report}"


class Signals:
    """Records SIGINT, SIGTERM and SIGHUP for the stages to poll; while waiting for a board they raise Interrupted."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.reason = ""
        self.raising = False

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._note) for number in self.NUMBERS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        self.raising = True
        try:
            yield
        finally:
            self.raising = False

    def _note(self, number: int, frame: object) -> None:
        self.reason = self.reason or f"{signal.Signals(number).name} ended the night"
        if self.raising:
            self.raising = False
            raise Interrupted(self.reason)


def nightly(options: Options, say: Say = lambda line: None) -> NightResult:
    """Runs a night and reports it. Raises BadInput for an unknown board, model or folder."""
    board, model = place.find(options.board), variant.find(options.model)
    before = history.read(options.history, board.name, model.name)
    preflight.require_set_up(board)
    plan = preflight.check(board, model.name, options.bundle, options.history, before)
    notify.words(options.notify)
    for line in (plan.unjudged, *plan.notes):
        if line:
            say(line)
    started = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    clock = time.monotonic()
    with run_folder.claimed(options.out / board.name):
        return _night(options, board, model, before, plan, started, clock, say)


def _night(
    options: Options, board: Board, model: Variant, before: History, plan: Plan, started: str, clock: float, say: Say
) -> NightResult:
    folder = run_folder.new(options.out / board.name / "nights" / model.name, started, KEPT_NIGHTS)
    signals = Signals()
    pipeline = Pipeline(options, board, model, folder, say, lambda: signals.reason)
    pipeline.unjudged = bool(plan.unjudged)
    stage.adopt_orphans()
    others = set(stage.children(os.getpid()))
    with signals.caught():
        _hold(pipeline, signals)
        stage.sweep(others)
        known = {"commit": checkout.commit(), "pins": checkout.pins(), **_seen(pipeline)}
        night = Night(board.name, model.name, started, time.monotonic() - clock, "red", "", **known)
        return _report(pipeline, night, before, plan)


def record(board: str, model: str, maker: str, folder: Path, nights: int) -> Path:
    """Writes the gates of a board and a model from the last `nights` that measured something. Raises BadInput."""
    past = history.measured(history.read(folder, place.find(board).name, model).nights, maker)[-nights:]
    if not past:
        raise BadInput(
            f"{folder} has no night of {model} by {maker} on {board}: {commands.invoke('nightly', '--board', board)}"
        )
    commit = f" at {past[-1].commit[:7]}" if past[-1].commit else ""
    source = f"{len(past)} nights {past[0].started[:10]} to {past[-1].started[:10]}{commit}"
    return gate.record(place.find(board).name, model, maker, [night.figures for night in past], source)


def _hold(pipeline: Pipeline, signals: Signals) -> None:
    """Reserves the board, measures, switches it off, releases it."""
    started = time.monotonic()
    with contextlib.suppress(StageFailed):
        try:
            with contextlib.ExitStack() as last:
                pipeline.require_built()
                with signals.raised():
                    pipeline.reserve(last)
                try:
                    pipeline.measure()
                except StageFailed:
                    pipeline.examine()
                    raise
                finally:
                    pipeline.power_off()
        except Failure as failure:
            pipeline.note("release", started, str(failure))


def _seen(pipeline: Pipeline) -> dict[str, Any]:
    """Collects the results of the stages: digests of the bundle, figures, versions reported by the board."""
    seen: dict[str, Any] = {"handed_in": pipeline.options.bundle is not None}
    with contextlib.suppress(Failure):
        if not any(done.name in ("build", stage.HANDED_IN) and not done.failed for done in pipeline.stages):
            raise BadInput("the bundle is of another night")
        manifest = read_manifest(pipeline.bundle)
        files = {name: entry["sha256"][:16] for name, entry in manifest["files"].items()}
        seen |= {"maker": manifest["maker"], "files": files, "manifest_sha256": sha256(pipeline.bundle / MANIFEST)}
    check = strict_json.read_or_nothing(pipeline.folder / "check.json")
    seen["layers"] = {
        f"{entry['part']} {entry['stage']}": [entry["cosine"], entry["worst"]]
        for entry in check.get("layers", [])
        if None not in (entry["cosine"], entry["worst"])  # not finite: the build has failed because of it
    }
    found = strict_json.read_or_nothing(pipeline.folder / "figures.json")
    machine = found.get("machine")
    machine = machine if isinstance(machine, dict) else {}
    seen["machine"] = {name: _text(machine[name]) for name in ("board", "cpu", "system", "python") if machine.get(name)}
    seen["machine"] |= pipeline.records.versions()
    seen["engine"], seen["reference_sha256"] = _text(found.get("engine", "")), _text(found.get("reference_sha256", ""))
    seen["figures"] = metrics.figures(found.get("figures"))
    if seen["figures"]:
        counted = metrics.figures(strict_json.read_or_nothing(pipeline.folder / INSTRUCTIONS))
        seen["figures"] |= counted | metrics.figures(pipeline.records.soaked())
    named = found.get("evidence")
    named = named if isinstance(named, dict) else {}
    seen["release"], seen["package"] = _text(named.get("release", "")), _text(named.get("package", ""))
    if isinstance(python := named.get("python"), dict):
        seen["machine"]["interpreter"] = _text(" ".join(str(python.get(key, "")) for key in PYTHON))
    loaded = named.get("library")
    seen["engine_sha256"] = _text(loaded.get("sha256", "")) if isinstance(loaded, dict) else ""
    return seen


def _mismatches(pipeline: Pipeline) -> list[str]:
    """Differences between the built, the deployed and the measured release."""
    found = strict_json.read_or_nothing(pipeline.folder / "figures.json")
    kept = found.get("evidence")
    if not found.get("figures") and not (isinstance(kept, dict) and kept.get("faults")):
        return []  # nothing was measured
    try:
        return evidence.differences(evidence.read(pipeline.folder / DEPLOYED), read_manifest(pipeline.bundle), found)
    except Failure as failure:
        return [str(failure)]


def _report(pipeline: Pipeline, night: Night, before: History, plan: Plan) -> NightResult:
    """Judges the night, appends it to the history and writes its report."""
    folder, notes, gates = pipeline.folder, [*before.faults, *plan.notes], plan.gates
    measured = strict_json.read_or_nothing(folder / "figures.json")
    judged = gate.judge(night.figures, gates) if night.figures else []
    mismatches = _mismatches(pipeline)
    cases = junit.cases(folder / "junit.xml")
    excused = quarantine.excuse(plan.quarantine, pipeline.stages, judged, cases)
    stages, judged = list(excused.stages), list(excused.judged)
    found = verdict(stages, judged, excused.tests, before.nights, night, mismatches, plan.unjudged)
    found = excused.verdict(found).after(pipeline.flaky)
    bounds = {name: entry.text() for name, entry in gates.items()} if night.figures else {}
    details, worse = pipeline.records.details(measured), any(entry.red and entry.value is not None for entry in judged)
    blame = board_records.blame(stages, found.stage, bool(found.code), worse)
    notes += [*([board_records.CODE_NOTE] if blame == "code" else []), *pipeline.records.all_notes(measured)]
    night = replace(night, verdict=found.word, reason=found.reason, stage=found.stage, gates=bounds)
    night = replace(night, blame=blame, sensors=details.sensors, flaky=pipeline.flaky, quarantined=excused.record())
    stages = [_explained(done, found) for done in stages]
    if pipeline.options.bisect:
        counted = [case for case in cases if set(case.messages) <= set(excused.tests)]
        named = bisection.run(pipeline, night, before.nights, judged, counted)
        night = replace(night, culprit=named.culprit, seconds=night.seconds + named.seconds)
        notes += named.notes
        stages += named.stages
    try:
        kept = str(history.append(pipeline.options.history, night))
    except Failure as failure:
        kept = ""
        stages.append(_failed("history", folder, failure))
        found = found if found.code else verdict(stages, judged, [], before.nights, night, mismatches, plan.unjudged)
    notes += excused.notes()
    if often := retry.flaky([*history.of_board(pipeline.options.history, night.board), *([] if kept else [night])]):
        notes.append(often)
    green = history.last_green(before.nights)
    notes += drifts(night.figures, gates, before.nights, night.maker)
    well = f"{sum(entry.outcome == 'within' for entry in judged)} figures within their gates"
    what = f"{night.model} (bundle handed in)" if night.handed_in else night.model
    diagnosis = doctor.read(folder / doctor.FILE)
    reason = diagnosis.first(found.reason) if found.code else found.reason
    headline = f"{found.word}: {what} on {pipeline.board.title}: {reason or well}{excused.headline()}"
    notes = [*diagnosis.notes(), *notes]
    found = replace(found, advice=diagnosis.advice(found.advice)) if found.code else found
    if night.flaky and not found.code:
        headline += f"; flaky: {night.flaky}, passed on the second try"
    if night.culprit:
        headline += f"; since {night.culprit}"
    artifacts = [(name, what) for name, what in ARTIFACTS.items() if (folder / name).is_file()]
    page = Page(
        night=night,
        board=pipeline.board.title,
        headline=headline,
        advice=found.advice,
        stages=stages,
        judgements=judged,
        nights=[*before.nights, night],
        last_green=green,
        changes=changes.between(green, night, ROOT) if green else None,
        notes=notes,
        board_details=details,
        artifacts=[*artifacts, *([(kept, "history of all nights, one JSON object per line")] if kept else [])],
    )
    report = folder / "report.html"
    report.write_text(render(page), "utf-8")
    if failed := _tell(pipeline.options.notify, before, night, headline, found, report):
        notes.append(failed)
        report.write_text(render(page), "utf-8")  # page.notes is this list
    return NightResult(headline, found, tuple(stages), tuple(judged), report, night, tuple(notes))


def _tell(command: str, before: History, night: Night, headline: str, found: Verdict, report: Path) -> str:
    """Runs the --notify command if the state changed; returns an error text, empty on success."""
    last = before.nights[-1] if before.nights else None
    changed = notify.change(last, night)
    if not command or not changed:
        return ""
    text = "\n".join([headline, *([found.advice] if found.advice else []), f"changed: {changed}", f"report: {report}"])
    return notify.send(notify.words(command), text, notify.facts(changed, last, night, headline, report))


def _explained(done: Stage, found: Verdict) -> Stage:
    """The measure stage with the verdict's reason, which says more than pytest's last line."""
    return replace(done, reason=found.reason) if done.failed and done.name == found.stage == MEASURE else done


def _failed(name: str, folder: Path, failure: Failure) -> Stage:
    console = folder / f"{name}.log"
    console.write_text(f"error: {failure}\n")
    return Stage(name, failure.exit_code, 0.0, 0.0, str(failure), console)


def _text(value: object) -> str:
    """A text reported by the board, printable and bounded."""
    return "".join(c if c.isprintable() else "�" for c in str(value)[:MOST_TEXT])

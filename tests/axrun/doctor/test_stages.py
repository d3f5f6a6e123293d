"""Stages run in order up to the first that disagrees, and undecidable ones are skipped; reports can be serialised."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from axrun.doctor.report import STAGES, Finding, Report
from axrun.doctor.stages import NotExamined, Stage, run_stages
from axrun.errors import BadInput
from axrun.progress import Progress


def report() -> Report:
    return Report("bundle", "cpu", "here", "ax")


def stages(**others: Stage) -> dict[str, Stage]:
    return {**{name: lambda: "fine" for name in STAGES}, **others}


def left() -> str:
    raise NotExamined("no figures")


def refuses() -> str:
    raise BadInput("cannot read x\nBuild it again.")


FOUND = Finding("layers", "layer 3", "l3.axmodel", "that", "this", "swapped", "Build again.")


def test_all_stages_agree() -> None:
    said: list[Progress] = []
    examined = run_stages(report(), stages(), said.append)
    assert examined.verdict == "healthy"
    assert said == [Progress(number, 10, name) for number, name in enumerate(STAGES, 1)]
    assert [entry.stage for entry in examined.results] == list(STAGES)


def test_the_first_finding_ends_the_run() -> None:
    examined = run_stages(report(), stages(layers=lambda: FOUND, answer=refuses))
    assert (examined.verdict, examined.exit_code, examined.finding) == ("faulty", 1, FOUND)
    assert examined.results[-1].stage == "layers"
    assert examined.headline() == "faulty: layers: layer 3 (l3.axmodel): swapped"


def test_undecidable_stages_are_skipped_and_listed() -> None:
    examined = run_stages(report(), stages(layers=left))
    assert (examined.verdict, examined.exit_code) == ("undecided", 0)
    assert examined.headline() == "undecided: not examined: layers"
    assert len(examined.results) == len(STAGES)
    without = {name: stage for name, stage in stages().items() if name != "post"}
    assert run_stages(report(), without).headline() == "undecided: not examined: post"


def test_a_failure_is_a_finding() -> None:
    finding = run_stages(report(), stages(post=refuses)).finding
    assert finding is not None
    assert (finding.stage, finding.seen, finding.advice) == ("post", "cannot read x", "Build it again.")


@pytest.mark.parametrize("stage", [lambda: FOUND, left, lambda: "fine"])
def test_a_report_round_trip(stage: Stage) -> None:
    examined = run_stages(report(), stages(layers=stage))
    again = Report.parse(json.loads(json.dumps(examined.json())))
    assert again == examined
    assert list(again.lines()) == list(examined.lines())


def spoiled(change: Callable[[dict[str, object]], object]) -> dict[str, object]:
    values = run_stages(report(), stages(layers=lambda: FOUND)).json()
    change(values)
    return values


@pytest.mark.parametrize(
    "values",
    [
        None,
        [],
        {},
        spoiled(lambda values: values.update(engine=3)),
        spoiled(lambda values: values.update(stages=None)),
        spoiled(lambda values: values.update(stages=[[]])),
        spoiled(lambda values: values.update(stages=[{"stage": [], "outcome": "agrees", "text": "", "seconds": 1}])),
        spoiled(lambda values: values.update(stages=[{"stage": "x", "outcome": "agrees", "text": "", "seconds": 1}])),
        spoiled(lambda values: values.update(finding={"stage": "layers"})),
        spoiled(lambda values: values.update(finding="red")),
    ],
)
def test_an_invalid_report_is_refused(values: object) -> None:
    with pytest.raises(ValueError, match=r"is|are|has|finds"):
        Report.parse(values)


def test_text_from_another_machine_is_made_printable() -> None:
    values = spoiled(lambda values: values.update(bundle="\x1b[31m" + "x" * 5000))
    assert Report.parse(values).bundle == "\ufffd[31m" + "x" * 995

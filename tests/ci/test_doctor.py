"""The doctor of a red night: its finding comes first, the night's reason stays, a board's answer is validated."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from axrun.doctor.report import Finding, Report, StageResult
from axrun.errors import BadInput, CheckFailed
from ci.device import doctor, place
from ci.device.doctor import Diagnosis

LAYERS = Finding("layers", "layer 3, decode", "l3.axmodel", "that", "this", "swapped with layer 4", "Build again.")
FILES = Finding("files", "x is missing", "x", "that", "this", "the copy was cut short", "Copy again.")
REASON = "mean KL divergence is 0.4, worse than its gate"


def report(finding: Finding | None = None, where: str = "here") -> Report:
    results = [StageResult("files", "agrees", "15 files", 0.1)]
    return Report("out/tiny", "cpu", where, "ax", results, finding)


def test_the_finding_comes_first_and_the_nights_reason_stays() -> None:
    found = Diagnosis({"here": report(LAYERS), "virtual": report()})
    assert found.first(REASON) == f"layers: layer 3, decode (l3.axmodel): swapped with layer 4 ({REASON})"
    assert found.advice("Look at what changed.") == "Build again."
    assert next(found.notes()) == "doctor: expected that; seen: this"


def test_the_earliest_stage_counts_whoever_found_it() -> None:
    assert Diagnosis({"here": report(LAYERS), "virtual": report(FILES)}).finding == FILES


def test_a_doctor_that_finds_nothing_or_fails_changes_no_reason() -> None:
    for found in (Diagnosis(), Diagnosis({"here": report()}, {"virtual": "no answer in 900 s"})):
        assert found.first(REASON) == REASON
        assert found.advice("Look.") == "Look."
    assert list(found.notes())[-1] == "doctor, virtual: could not examine: no answer in 900 s"


def test_a_written_diagnosis_reads_back(tmp_path: Path) -> None:
    found = Diagnosis({"here": report(LAYERS)}, {"virtual": "it hangs"})
    doctor.write(tmp_path / doctor.FILE, found)
    assert doctor.read(tmp_path / doctor.FILE) == found


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"schema": 1}', '{"schema": 1, "reports": [], "failures": {}}', "[" * 10_000),
        *('{"schema": 1, "reports": {"here": 3}, "failures": {}}', "x" * (doctor.MOST_FILE + 1)),
    ],
)
def test_an_invalid_diagnosis_reads_as_empty(text: str, tmp_path: Path) -> None:
    (tmp_path / doctor.FILE).write_text(text)
    assert doctor.read(tmp_path / doctor.FILE) == Diagnosis()


def test_there_is_none_of_a_stage_without_a_bundle(tmp_path: Path) -> None:
    board = place.find("virtual")
    (tmp_path / "bundle").mkdir()
    where = (board, tmp_path, tmp_path / "bundle", tmp_path / "checkpoint", 60.0)
    assert doctor.command("power on", *where) == []
    assert "--deployed" not in doctor.command("build", *where)
    assert "--deployed" in doctor.command("measure", *where)
    (tmp_path / "bundle").rmdir()
    assert doctor.command("measure", *where) == []


class Line:
    """A connection to a board that answers as it likes."""

    said: dict[str, Any]

    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> Line:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def call(self, verb: str, *_: object, **__: object) -> Any:
        return self.said[verb]


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> type[Line]:
    monkeypatch.setattr(doctor, "Connection", Line)
    return Line


def examined(code: int | None, stdout: str, stderr: str = "") -> dict[str, Any]:
    return {"release": "0" * 16, "code": code, "stdout": stdout, "stderr": stderr}


def test_a_boards_report_is_validated(line: type[Line]) -> None:
    board = place.find("virtual")
    at: Any = None
    line.said = {"examine": examined(1, json.dumps(report(LAYERS).json()))}
    found = doctor.on_board(board, at)
    assert (found.place, found.finding, found.exit_code) == ("virtual", LAYERS, 1)
    for said, told in (
        (examined(None, ""), "did not finish on virtual"),
        (examined(2, "", "error: engine ax needs libax_engine.so\nBuild it"), "ended with 2: error: engine ax needs"),
        (examined(0, "Welcome!"), "its report cannot be read"),
        (examined(0, '{"stages": []}'), "its report cannot be read"),
    ):
        line.said = {"examine": said}
        with pytest.raises(CheckFailed, match=told):
            doctor.on_board(board, at)


def test_another_model_on_the_board_is_refused_before_examination(line: type[Line]) -> None:
    line.said = {"facts": {"current": "0" * 16}, "release": {"name": "qwen2-0.5b"}}
    with pytest.raises(BadInput, match=r"has the model 'qwen2-0\.5b', expected 'tiny-qwen2'"):
        doctor.on_board(place.find("virtual"), None, model="tiny-qwen2")  # type: ignore[arg-type]


def test_one_doctor_that_fails_does_not_stop_the_other(line: type[Line], tmp_path: Path) -> None:
    line.said = {"examine": examined(0, json.dumps(report(where="x").json()))}
    found = doctor.examine(place.find("virtual"), tmp_path, tmp_path / "none", deployed=True, seconds=120.0)
    assert list(found.reports) == ["virtual"]
    assert list(found.failures) == ["here"]

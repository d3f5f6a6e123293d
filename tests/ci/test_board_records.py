"""Records of the board during a night, and their section in the report."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest

from axrun.errors import BadInput
from ci.device import console, kernel_log, place
from ci.device.connection import Connection
from ci.device.place import Board
from ci.nightly.board_records import BoardDetails, BoardRecords
from ci.nightly.report.page import render
from ci.nightly.stage import Stage
from tests.ci.test_report import HOSTILE, Outline, page


class Here(Connection):
    """This machine in place of a board: no SSH between."""

    def _shell(self) -> list[str]:
        return ["sh", "-c"]


@pytest.fixture
def board(tmp_path: Path) -> Board:
    state = tmp_path / "state"
    state.mkdir()
    return dataclasses.replace(place.find("virtual"), state=state)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "night"
    made.mkdir()
    return made


def ended(folder: Path, name: str, code: int = 0) -> Stage:
    (folder / "stage.log").write_text("")
    return Stage(name, code, 1.0, 1.0, "it broke" if code else "", folder / "stage.log")


def test_the_console_is_kept_and_shown_where_a_stage_failed(board: Board, folder: Path) -> None:
    records = BoardRecords(board, folder)
    records.begin()
    said, kept = board.state / "console.log", folder / console.NAME
    said.write_bytes(b"sshd: Server listening\r\nOops: 96000004\r\n")
    deadline = time.monotonic() + 60
    while "Oops" not in kept.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    records.failed(ended(folder, "measure", 1))
    with said.open("ab") as stream:
        stream.write(b"power goes\n")
    records.end()
    assert [line.partition(" ")[2] for line in records.around["measure"].splitlines()] == [
        "sshd: Server listening",
        "Oops: 96000004",
    ]
    assert "power goes" in kept.read_text(), "it is kept to the end"
    assert records.notes == []


def test_a_board_without_a_console_costs_a_note(folder: Path, tmp_path: Path) -> None:
    board = dataclasses.replace(place.find("ax650"), state=tmp_path)
    records = BoardRecords(board, folder)
    records.begin()
    assert records._recording is not None
    records._recording.wait(60)
    records.end()
    assert records.notes == ["no serial console: ax650.yaml names none"]


@pytest.mark.parametrize(
    "command", ["printf 'axera: probe\\033[31m failed\\n'", "echo 'dmesg: not permitted' >&2; exit 1"]
)
def test_the_kernel_log_is_read_or_the_reason_reported(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = dataclasses.replace(place.find("ax650"), state=tmp_path)
    (tmp_path / "dmesg").write_text(f"#!/bin/sh\n{command}\n")
    (tmp_path / "dmesg").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/local/bin:/usr/bin:/bin")
    if "exit" not in command:
        assert kernel_log.read(board, Here) == "axera: probe failed\n"
        return
    with pytest.raises(BadInput) as caught:
        kernel_log.read(board, Here)
    assert str(caught.value).startswith("the kernel log of ax650 cannot be read: dmesg: not permitted\nAs root on the")


def test_an_emulated_board_has_no_kernel_log(board: Board, folder: Path) -> None:
    with pytest.raises(BadInput, match="an emulated board has no kernel of its own"):
        kernel_log.read(board)
    records = BoardRecords(board, folder)
    records.log([ended(folder, "power on")])
    assert records.notes == []
    assert not (folder / kernel_log.NAME).exists()


def test_a_board_that_was_never_reached_is_not_asked_for_its_log(folder: Path, tmp_path: Path) -> None:
    records = BoardRecords(dataclasses.replace(place.find("ax650"), state=tmp_path), folder)
    records.log([ended(folder, "power on", 1)])
    assert records.notes == []


@pytest.mark.parametrize(
    ("seen", "shown"),
    [
        ({"soc 0, °C": [40.0, 41.5, 43.0]}, {"soc 0, °C": [40.0, 41.5, 43.0]}),
        ({"soc 0, °C": [40.0, "hot", 43.0], "x": [1.0], "y": None}, {}),
        ([1, 2], {}),
        (None, {}),
    ],
)
def test_sensors_of_a_file_that_a_board_had_its_say_in(seen: Any, shown: Any, board: Board, folder: Path) -> None:
    assert BoardRecords(board, folder).details({"sensors": {"summary": seen}}).sensors == shown
    assert BoardRecords(board, folder).details({"sensors": "none"}).sensors == {}


def test_the_report_escapes_the_boards_output(folder: Path) -> None:
    check = {
        "word": "ill", "started": "2026-11-26T02:00:00Z", "kit": HOSTILE, "faults": [HOSTILE], "notes": [],
        "speed": {"ttft_ms": 8.0}, "sizes": {"memory": 1e9}, "versions": {"bsp": HOSTILE},
    }  # fmt: skip
    told = BoardDetails(check, {HOSTILE: [40.0, 41.5, 43.0]}, [HOSTILE], {"measure": f"Oops {HOSTILE}"}, HOSTILE)
    outline = Outline(render(dataclasses.replace(page(folder), board_details=told)))
    assert outline.open == []
    assert not outline.of("script")
    assert not outline.of("img")
    text = " ".join("".join(outline.text).split())
    assert "Unhealthy before the night" in text
    assert f"Oops {HOSTILE}" in text
    assert "41.5" in text


def test_notes_of_a_health_check_are_in_the_report(board: Board, folder: Path) -> None:
    notes = ["the board's kernel is 6.1, was 5.15", "memory of an emulated board are the host's: recorded"]
    (folder / "health.json").write_text(json.dumps({"notes": notes, "versions": {"kernel": "6.1", "python": "3.11"}}))
    records = BoardRecords(board, folder)
    assert records.all_notes({"sensors": {"summary": {}, "notes": ["the board shows none"]}}) == [f"health: {notes[0]}"]
    assert (
        records.all_notes({"sensors": {"summary": {"soc": [90.0] * 3}, "notes": ["soc got hot"]}})[-1] == "soc got hot"
    )
    assert records.versions() == {"kernel": "6.1"}
    (folder / "health.json").write_text("[")
    assert records.versions() == {}


def test_a_night_asks_few_questions_and_a_soak_many(board: Board, folder: Path) -> None:
    records = BoardRecords(board, folder)
    assert [records.soak(folder, long)[-1] for long in (False, True)] == ["40", "1000"]

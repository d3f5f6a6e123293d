"""Temperatures and clocks from a board's /sys (a folder here), read by the program that is sent to boards."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from ci.device import place, programs, sensors
from ci.device.connection import Connection
from ci.device.on_board import state
from ci.device.place import Address, Board
from ci.device.sensors import Readings


class Here(Connection):
    """This machine in place of a board, with another /sys."""

    def _shell(self) -> list[str]:
        return ["sh", "-c"]


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n")


@pytest.fixture
def sys_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two zones of one type, one without an answer, two clocks, a fan that runs."""
    thermal, cpu = tmp_path / "class" / "thermal", tmp_path / "devices" / "system" / "cpu"
    points: dict[str, Any] = {"trip_point_0_type": "passive", "trip_point_0_temp": 75000}
    points |= {"trip_point_1_type": "critical", "trip_point_1_temp": 105000}
    write(thermal / "thermal_zone0", type="soc", temp=61250, **points)
    write(thermal / "thermal_zone1", type="soc", temp=73900)
    write(thermal / "thermal_zone2", type="npu")
    write(thermal / "cooling_device0", type="fan", cur_state=2)
    write(thermal / "cooling_device1", type="cpufreq", cur_state=0)
    clock = {"scaling_governor": "performance", "cpuinfo_max_freq": 1700000}
    for number, now in enumerate((1700000, 1200000)):
        write(cpu / f"cpu{number}" / "cpufreq", scaling_cur_freq=now, **clock)
    monkeypatch.setattr(state, "SYS", tmp_path)
    return tmp_path


def test_sensors_are_read_from_sysfs(sys_folder: Path) -> None:
    board = state.State("axrun")
    assert board.readings() == {
        "degrees": {"soc 0": 61.25, "soc 1": 73.9},
        "clocks": {"cpu0": 1700.0, "cpu1": 1200.0},
        "cooling": {"fan 0": 2},
    }
    assert board.limits() == {
        "hot": {"soc 0": 75.0},
        "most": {"cpu0": 1700.0, "cpu1": 1700.0},
        "governor": "performance",
    }


def seen(*answers: dict[str, Any], **limits: Any) -> Readings:
    found = Readings(**limits)
    for answer in answers:
        found.add(json.loads(json.dumps(answer)))
    return found


def test_least_median_and_most_of_each() -> None:
    found = seen(*({"degrees": {"soc 0": value}, "clocks": {"cpu0": 1700}} for value in (50, 52, 60.5)))
    assert found.summary() == {"soc 0, °C": [50.0, 52.0, 60.5], "cpu0, MHz": [1700.0, 1700.0, 1700.0]}
    assert list(found.notes()) == []


@pytest.mark.parametrize(
    ("limits", "degrees", "told"),
    [
        ({"hot": {"soc 0": 75.0}}, 71.0, []),
        ({"hot": {"soc 0": 75.0}}, 73.5, ["soc 0 got hot during the measurement: 73.5 °C, the kernel acts at 75 °C"]),
        ({}, 84.0, []),
        ({}, 88.2, ["soc 0 got hot during the measurement: 88.2 °C"]),
    ],
)
def test_a_hot_board_is_noted(limits: dict[str, Any], degrees: float, told: list[str]) -> None:
    assert list(seen({"degrees": {"soc 0": 40.0}}, {"degrees": {"soc 0": degrees}}, **limits).notes()) == told


@pytest.mark.parametrize(
    ("governor", "clocks", "told"),
    [
        ("performance", (1700, 1700), ""),
        (
            "performance",
            (1700, 1000),
            "the clock of cpu0 was 1000 MHz during the measurement, its maximum is 1700 (gov",
        ),
        ("ondemand", (400, 1700), ""),
        ("ondemand", (400, 1000), "the clock of cpu0 was 1000 MHz during the measurement, its maximum is 1700 (gov"),
    ],
)
def test_a_clock_that_dropped_is_noted(governor: str, clocks: tuple[float, ...], told: str) -> None:
    found = seen(*({"clocks": {"cpu0": value}} for value in clocks), most={"cpu0": 1700.0}, governor=governor)
    assert [note[: len(told)] for note in found.notes()] == ([told] if told else [])


def test_a_cooling_device_that_acts_is_noted() -> None:
    found = seen({"degrees": {"soc 0": 40.0}, "cooling": {"fan 0": 1}}, {"cooling": {"fan 0": 3}})
    assert list(found.notes()) == ["cooling device fan 0 was active during the measurement, up to state 3"]


def test_a_board_without_sensors_has_none() -> None:
    assert list(seen({}).notes()) == ["the board reports no temperatures and no clocks"]


@pytest.mark.parametrize(
    "answer",
    [
        {"degrees": {"soc": "hot"}, "clocks": [1, 2]},
        {"degrees": {"soc": 1e9}, "clocks": {"cpu0": -5}},
        {"degrees": {"soc": True}, "clocks": {"cpu0": None}},
        {"degrees": None},
    ],
)
def test_invalid_sensor_values_are_skipped(answer: dict[str, Any]) -> None:
    assert seen(answer).summary() == {}


def test_a_board_that_says_too_much_is_bounded() -> None:
    found = seen(*({"degrees": {f"{number}\x1b[31m{'x' * 500}": 1.0 for number in range(start, start + 500)}}
                   for start in range(0, 2000, 500)))  # fmt: skip
    assert len(found.degrees) == sensors.MOST_SENSORS
    assert all(len(name) <= sensors.MOST_NAME and name.isprintable() for name in found.degrees)


def test_they_are_read_while_something_runs(tmp_path: Path, sys_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program in a process of its own, its /sys replaced, as many readings as there is time for."""
    folder = shutil.copytree(programs.FOLDER, tmp_path / "on_board")
    text = (folder / "state.py").read_text("utf-8")
    assert 'Path("/sys")' in text
    (folder / "state.py").write_text(text.replace('Path("/sys")', f"Path({str(sys_folder)!r})"), "utf-8")
    monkeypatch.setattr(programs, "FOLDER", folder)
    monkeypatch.setattr(programs, "sent", programs.sent.__wrapped__)
    board = dataclasses.replace(place.find("virtual"), state=tmp_path)
    with sensors.reading(board, Address("", 1, "", tmp_path), 0.05, Here) as found:
        deadline = time.monotonic() + 60
        while found.count < 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert found.why == ""
    assert found.summary()["soc 1, °C"] == [73.9, 73.9, 73.9]
    assert list(found.notes())[:2] == [
        "the clock of cpu1 was 1200 MHz during the measurement, its maximum is 1700 (governor performance)",
        "cooling device fan 0 was active during the measurement, up to state 2",
    ]


def test_a_board_that_cannot_be_reached_costs_nothing_but_the_readings(tmp_path: Path) -> None:
    class Gone(Here):
        def _shell(self) -> list[str]:
            return ["sh", "-c", "exit 255 #"]

    board: Board = dataclasses.replace(place.find("virtual"), state=tmp_path)
    with sensors.reading(board, Address("", 1, "", tmp_path), 0.05, Gone) as found:
        pass
    (note,) = found.notes()
    assert note.startswith("the board reports no temperatures and no clocks: virtual was lost during start: ")

"""Preflight checks of a night: gates that are missing, misspelled, removed or never measured; history; power."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from axrun.errors import BadInput
from ci.device import place
from ci.device.place import Board
from ci.nightly import gate, history, instructions, metrics, preflight
from ci.nightly.history import History, Night
from tests.ci.test_history import night

GATES = {"mean_kld": "1e-5 ± 1e-6 nats", "decode_128": "20 ± 4 token/s"}
TABLE = '[{}]\nexpected = 20.0\ntolerance = 4.0\nunit = "{}"\nbasis = "measured"\nsource = "nights"\n'


@pytest.fixture
def board() -> Board:
    return place.find("virtual")


@pytest.fixture
def gates(tmp_path: Path) -> Path:
    folder = tmp_path / "gates"
    write(folder, "virtual/tiny-qwen2.toml", "cpu.decode_128", "cpu.ttft_16")
    return folder


def unit(name: str) -> str:
    return metrics.find(name.partition(".")[2]).unit if "512" not in name else "token/s"


def write(folder: Path, name: str, *figures: str) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(TABLE.format(name, unit(name)) for name in figures))
    return file


def check(board: Board, gates: Path, *nights: Night, **given: Any) -> preflight.Plan:
    options = {"model": "tiny-qwen2", "bundle": None, "folder": gates.parent / "history", **given}
    return preflight.check(board, options["model"], options["bundle"], options["folder"], History(nights, ()), gates)


def refused(board: Board, gates: Path, *nights: Night, **given: Any) -> str:
    with pytest.raises(BadInput) as caught:
        check(board, gates, *nights, **given)
    assert len(str(caught.value).splitlines()) <= 3
    return str(caught.value)


def test_a_night_that_can_be_held_and_judged(board: Board, gates: Path) -> None:
    plan = check(board, gates, night(gates={"decode_128": "20 ± 4 token/s"}))
    assert (plan.maker, plan.unjudged, plan.notes) == ("cpu", "", ())
    assert list(plan.gates) == ["ttft_16", "decode_128"] or set(plan.gates) == {"ttft_16", "decode_128"}


def test_the_first_nights_of_a_maker_are_recorded(board: Board, gates: Path) -> None:
    (gates / "virtual" / "tiny-qwen2.toml").unlink()
    write(gates, "virtual/tiny-qwen2.toml", "pulsar2.decode_128")
    plan = check(board, gates)
    assert plan.unjudged == "recorded, not judged: no gates for cpu bundles yet, night 1 of 5"
    four = [night(number, gates={}) for number in range(1, 5)]
    others = [night(9, maker="pulsar2", gates=GATES), night(9, figures={}, gates={})]
    assert check(board, gates, *four, *others).unjudged.endswith("night 5 of 5")
    text = refused(board, gates, *four, night(5, gates={}))
    assert text.startswith("5 nights of cpu bundles of tiny-qwen2 on virtual are recorded, but there are no gates\n")
    assert "invoke gate.record --board virtual --model tiny-qwen2 --maker cpu" in text


def test_gates_that_went_away_altogether_are_no_first_night(board: Board, gates: Path) -> None:
    (gates / "virtual" / "tiny-qwen2.toml").unlink()
    text = refused(board, gates, night(1, gates=GATES), night(2, gates={}))
    assert text.startswith(
        "the gates for cpu bundles of tiny-qwen2 on virtual disappeared: 2 judged the night of 2026-11-01\n"
    )


def test_a_removed_gate_is_a_note(board: Board, gates: Path) -> None:
    plan = check(board, gates, night(1, gates=GATES))
    assert plan.notes == (
        "a gate disappeared since the night of 2026-11-01: mean KL divergence from the checkpoint had to be "
        "1e-5 ± 1e-6 nats, and is no longer judged",
    )


@pytest.mark.parametrize(
    "name", ["virtual/tiny-qwen.toml", "virtaul/tiny-qwen2.toml", "virtual/tiny-qwen2.tml", "virtual/tiny_qwen2.toml"]
)
def test_a_misspelled_gate_file_is_refused(name: str, board: Board, gates: Path) -> None:
    (gates / "virtual" / "tiny-qwen2.toml").unlink()
    write(gates, name, "cpu.decode_128")
    assert f"{gates / name}: is its name misspelled?" in refused(board, gates)


def test_another_models_gates_are_no_misspelling(board: Board, gates: Path) -> None:
    (gates / "virtual" / "tiny-qwen2.toml").unlink()
    write(gates, "virtual/qwen2-0.5b.toml", "cpu.decode_128")
    write(gates, "ax650/tiny-qwen2.toml", "cpu.decode_128")
    assert check(board, gates).unjudged


def test_a_gate_that_no_night_measures(board: Board, gates: Path) -> None:
    write(gates, "virtual/tiny-qwen2.toml", "cpu.decode_512")
    text = refused(board, gates)
    assert "no night measures cpu.decode_512; a night measures mean_kld, " in text


def test_gates_of_instructions_are_held_where_they_can_be_counted(
    board: Board, gates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (instructions.ENGINE, instructions.RUNNER, "runner_instructions_399")
    write(gates, "virtual/tiny-qwen2.toml", "cpu.decode_128", *(f"cpu.{name}" for name in names))
    monkeypatch.setattr(instructions, "unavailable", lambda: "")
    plan = check(board, gates)
    assert set(plan.gates) == {"decode_128", *names[:2]}
    (note,) = plan.notes
    assert note.startswith("not judged: instructions of the runner, Python 399: this is Python 3.")
    monkeypatch.setattr(instructions, "unavailable", lambda: "there is no valgrind")
    plan = check(board, gates)
    assert set(plan.gates) == {"decode_128"}
    assert len(plan.notes) == 3


@pytest.mark.parametrize("what", ["a loop", "a folder", "no TOML"])
def test_a_file_that_cannot_be_read(what: str, board: Board, gates: Path) -> None:
    file = gates / "virtual" / "tiny-qwen2.toml"
    file.unlink()
    if what == "a loop":
        file.symlink_to(file)
    elif what == "a folder":
        file.mkdir()
    else:
        file.write_text("[cpu")
    assert refused(board, gates).startswith((f"cannot read {file}: ", f"{file} is not valid TOML: "))


def test_the_shipped_gates_can_all_be_reached() -> None:
    for file in sorted(gate.GATES.rglob("*.toml")):
        for maker in gate.MAKERS:
            gates = gate.load(file.parent.name, file.stem, maker)
            preflight._require_measurable(file, place.find(file.parent.name), maker, gates)


def test_the_shipped_boards_can_hold_their_nights(tmp_path: Path) -> None:
    """Of the workflow: cpu bundles where only the vendor's have gates."""
    for name, model in (("virtual", "tiny-qwen2"), ("ax650-farm", "qwen2-0.5b"), ("ax630c", "qwen2-0.5b")):
        board = place.find(name)
        plan = preflight.check(board, model, None, tmp_path, history.read(tmp_path, board.name, model))
        assert bool(plan.unjudged) == (board.name != "virtual")


def test_a_history_that_cannot_be_written(board: Board, gates: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    text = refused(board, gates, folder=tmp_path / "file")
    assert text.startswith(f"cannot add to {tmp_path / 'file' / 'virtual' / 'tiny-qwen2.jsonl'}: Not a directory")
    assert history.read(tmp_path / "history", "virtual", "tiny-qwen2").nights == ()


def test_a_board_without_a_power_port(board: Board, gates: Path, tmp_path: Path) -> None:
    for name in ("virtual", "ax650", "ax650-farm"):
        text = (place.BOARDS / f"{name}.yaml").read_text()
        start = min(
            text.find(word) for word in ("      ExternalPowerDriver", "      NetworkPowerDriver") if word in text
        )
        yaml = tmp_path / f"{name}.yaml"
        yaml.write_text(text[:start] + text[text.index("options:") :])
        without = dataclasses.replace(place.find(str(yaml)), state=board.state)
        assert f"{yaml} has no power port, and a night switches its board off and on" in refused(without, gates)


def test_a_bundle_that_is_not_there(board: Board, gates: Path, tmp_path: Path) -> None:
    assert refused(board, gates, bundle=tmp_path / "none").startswith("no bundle folder ")


def test_a_board_that_is_not_set_up_is_refused_before_a_night_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LG_BOARD_ADDRESS", "LG_COORDINATOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", "/nonexistent")
    monkeypatch.setattr("socket.getaddrinfo", unknown)
    with pytest.raises(BadInput, match=r"ax650 is not set up on this machine: 'ax650', the placeholder in"):
        preflight.require_set_up(place.find("ax650"))
    with pytest.raises(BadInput, match="the board is in a farm: set its coordinator"):
        preflight.require_set_up(place.find("ax650-farm"))
    monkeypatch.setenv("LG_BOARD_ADDRESS", "192.168.1.50")
    preflight.require_set_up(place.find("ax650"))
    preflight.require_set_up(place.find("virtual"))


def unknown(*_: object) -> None:
    raise OSError("Name or service not known")


def test_a_gate_without_a_figure_is_refused(board: Board, gates: Path) -> None:
    file = gates / "virtual" / "tiny-qwen2.toml"
    file.write_text(re.sub(r"tolerance = .*", "tolerance = 1e14", file.read_text()))
    assert any("passes almost any value: " in note for note in check(board, gates).notes)

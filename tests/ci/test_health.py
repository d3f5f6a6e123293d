"""Health checks: their verdict against the board's baseline, and whether a red night is the board's or the code's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from axrun.errors import CheckFailed
from ci.device import place
from ci.device.evidence import Record
from ci.device.place import Board
from ci.nightly import board_records, health, health_log
from ci.nightly.health import Kit, Observed
from ci.nightly.health_log import FIRST, HEALTHY, UNHEALTHY, Check
from ci.nightly.stage import Stage
from ci.nightly.verdict import verdict
from tests.ci.test_history import night

RECORD = Record("ax650", "a" * 16, "b" * 16, "c" * 16, "", {}, {})
KIT = Kit(RECORD, health.PROMPT, health.ANSWER)
STATE: dict[str, Any] = {
    "versions": {"bsp": "V1.45.0_P39", "kernel": "5.15.73", "python": "3.10.12"},
    "memory_total": 8 << 30,
    "memory": 1 << 30,
    "cmm": 6 << 30,
    "disk_total": 32 << 30,
    "disk": 20 << 30,
}
RATE = "decode_tokens_per_s"


@pytest.fixture
def board() -> Board:
    return place.find("ax650")


def seen(speed: float = 100.0, tokens: tuple[int, ...] = health.ANSWER, **state: Any) -> Observed:
    return Observed({**STATE, **state}, tokens=tokens, speed={"ttft_ms": 8.0, RATE: speed})


def before(board: Board, count: int = 5, **state: Any) -> list[Check]:
    """Good checks of a board."""
    checks: list[Check] = []
    for number in range(count):
        checks.append(health.judge(board, KIT, seen(100.0 + number % 2, **state), checks))
    return checks


def test_the_known_answer_is_the_checkpoints(tiny_qwen2: Path) -> None:
    """Greedy, in float32, by transformers."""
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(tiny_qwen2, dtype=torch.float32).eval()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(tiny_qwen2)
    messages = [{"role": "user", "content": health.PROMPT}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    given = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    said = model.generate(**given, do_sample=False, max_new_tokens=health.TOKENS)[0][
        given.input_ids.shape[1] :
    ].tolist()
    assert tuple(said[:-1]) == health.ANSWER
    assert said[-1] == tokenizer.eos_token_id


def test_the_known_bundle_answers_here_as_the_checkpoint_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    health._build(tmp_path / "first")
    monkeypatch.setattr(health, "ANSWER", (*health.ANSWER[:-1], 14))
    with pytest.raises(CheckFailed, match=r"it answers 'who are you\?' with .*, the checkpoint with"):
        health._build(tmp_path / "second")


def test_the_first_check_is_recorded_and_not_judged(board: Board) -> None:
    found = health.judge(board, KIT, seen(), [])
    assert (found.word, found.faults) == (FIRST, ())
    assert found.notes == ("first check with this bundle: no baseline for speed and memory yet",)
    again = health.judge(board, KIT, seen(), [found])
    assert (again.word, again.notes) == (HEALTHY, ())


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (seen(speed=60.0), "it is slow: 60.0 token/s with the known-good bundle; the last 5 checks had 100.0"),
        (
            seen(memory=700 << 20),
            "free memory dropped to 734 MB; the last 5 checks had 1074",
        ),
        (seen(cmm=5 << 30), "free CMM dropped to 5369 MB; the last 5 checks had 6442 MB"),
        (seen(disk=100 << 20), "its disk is full: 105 MB are free, a release needs 268 MB"),
        (
            seen(tokens=(40, 486, 1)),
            "its answer to 'who are you?' differs from token 3 on: [1], expected ",
        ),
        (seen(tokens=()), "its answer to 'who are you?' differs from token 1 on: [], expected [40, 486,"),
    ],
)
def test_the_fault_of_a_board_is_named(now: Observed, told: str, board: Board) -> None:
    found = health.judge(board, KIT, now, before(board))
    assert found.word == UNHEALTHY
    assert found.faults[0].startswith(told)
    assert len(found.faults) == 1
    reason, _, advice = found.reason("ax650").partition("\n")
    assert reason == f"board: {found.faults[0]}"
    assert "invoke board.health --board ax650" in advice


@pytest.mark.parametrize("now", [seen(speed=92.0), seen(memory=980 << 20), seen(cmm=(6 << 30) - (2 << 20))])
def test_differences_within_the_tolerance_are_healthy(now: Observed, board: Board) -> None:
    assert health.judge(board, KIT, now, before(board)).word == HEALTHY


def test_unhealthy_checks_are_not_part_of_the_baseline(board: Board) -> None:
    past = before(board)
    past += [health.judge(board, KIT, seen(speed=20.0), past) for _ in range(10)]
    assert health.judge(board, KIT, seen(speed=20.0), past).word == UNHEALTHY


def test_speed_is_compared_with_the_same_bundle_alone(board: Board) -> None:
    other = dataclasses.replace(KIT, record=dataclasses.replace(RECORD, release="d" * 16))
    assert health.judge(board, other, seen(speed=20.0), before(board)).word == FIRST


@pytest.mark.parametrize(
    ("past", "now", "told"),
    [
        ({}, seen(speed=150.0), "the known-good bundle became faster: 150.0 token/s, before 100.0; did clocks change?"),
        ({}, seen(versions={"kernel": "5.15.74", "python": "3.10.12"}), "the board's bsp is gone, was V1.45.0_P39"),
    ],
)
def test_early_warnings_are_notes(past: dict[str, Any], now: Observed, told: str, board: Board) -> None:
    found = health.judge(board, KIT, now, before(board, **past))
    assert found.word == HEALTHY
    assert found.notes[0] == told


def test_a_disk_that_is_filling_up_is_a_note(board: Board) -> None:
    past: list[Check] = []
    for left in (1500, 1300, 1100, 900, 700):
        past.append(health.judge(board, KIT, seen(disk=left << 20), past))
    assert [check.notes for check in past[1:4]] == [(), (), ()]
    assert past[4].notes == ("its disk fills by 210 MB per check: full after 2 more checks",)


def test_an_emulated_boards_size_and_speed_are_not_judged() -> None:
    virtual = place.find("virtual")
    found = health.judge(virtual, KIT, seen(speed=1.0, memory=1 << 20, disk=1 << 20), before(virtual))
    assert found.word == HEALTHY
    assert found.notes == ("speed, memory and disk of an emulated board are the host's: recorded, not judged",)


def test_the_log_of_checks_survives_a_crash(board: Board, tmp_path: Path) -> None:
    checks = before(board)
    folder = health_log.place(tmp_path, "ax650")
    health_log.append(folder, checks[0])
    with (folder / health_log.CHECKS).open("ab") as stream:
        stream.write(b'{"schema": 1, "star')
    health_log.append(folder, checks[1])
    with (folder / health_log.CHECKS).open("ab") as stream:
        stream.write(b'{"schema": 2}\n[]\n{"schema": 1, "sizes": {"memory": NaN}}\n')
    health_log.append(folder, checks[2])
    assert health_log.read(folder) == checks[:3]
    assert health_log.read(health_log.place(tmp_path, "ax630c")) == []


@pytest.mark.parametrize(
    "text", ["", "[]", '{"schema": 1}', '{"schema": 1, "record": {}, "prompt": "x", "tokens": null}']
)
def test_an_unusable_kit_reads_as_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "kit.json").write_text(text)
    assert Kit.read(tmp_path / "kit.json") is None
    KIT.write(tmp_path / "kit.json")
    assert Kit.read(tmp_path / "kit.json") == KIT


def stages(folder: Path, *names: str, failed: str = "", reason: str = "") -> list[Stage]:
    console = folder / "console"
    console.write_text("")
    return [Stage(name, int(name == failed), 1.0, 1.0, reason if name == failed else "", console) for name in names]


def test_a_night_on_an_unhealthy_board_is_red_and_names_the_board(tmp_path: Path) -> None:
    reason = "board: its disk is full: 105 MB are free, a release needs 268 MB\nMake room."
    held = stages(tmp_path, "power on", "health", failed="health", reason=reason)
    found = verdict(held, [], [], [], night(1))
    assert (found.reason, found.advice) == (reason.partition("\n")[0], "Make room.")
    assert (found.stage, found.code) == ("health", 1)
    assert board_records.blame(held, found.stage, True, False) == "board"
    (short,) = stages(tmp_path, "health", failed="health", reason="board: slow")
    assert "invoke board.health --board virtual" in verdict([short], [], [], [], night(1)).advice


@pytest.mark.parametrize(
    ("names", "failed", "reason", "worse", "blamed"),
    [
        (("power on",), "power on", "no sshd", False, "board"),
        (("power on", "health"), "health", "board: slow", False, "board"),
        (
            ("power on", "health"),
            "health",
            "cannot build the known-good bundle on this machine: no clang",
            False,
            "code",
        ),
        (("power on", "health", "build"), "build", "layer 2", False, "code"),
        (("power on", "health", "build", "measure"), "measure", "speed", True, "code"),
        (("power on", "health", "build", "measure"), "measure", "virtual hangs", False, ""),
        (("power on", "build"), "build", "layer 2", False, ""),
    ],
)
def test_a_red_night_names_board_or_code(
    names: tuple[str, ...], failed: str, reason: str, worse: bool, blamed: str, tmp_path: Path
) -> None:
    held = stages(tmp_path, *names, failed=failed, reason=reason)
    assert board_records.blame(held, failed, True, worse) == blamed
    assert board_records.blame(held, failed, False, worse) == ""

"""Reading a matrix file: its nights and boards, errors with their lines, gates of variants."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from axrun.errors import BadInput
from ci.device import place
from ci.nightly import history, matrix, preflight, variant
from tests.ci.matrix.matrices import PLAIN, ROOT, board_yaml, written
from tests.ci.test_history import night


def test_every_night_of_the_file_board_by_board(tmp_path: Path) -> None:
    found = matrix.read(written(tmp_path))
    assert [cell.name for cell in found.cells] == [
        "tiny-qwen2 on virtual (emulated)",
        "tiny-qwen2@s4 on virtual (emulated)",
        "tiny-qwen2 on ax650",
    ]
    assert found.excluded == {("ax650", "tiny-qwen2@s4"): "not yet"}
    assert [cell.build for cell in found.cells] == [
        ("tiny-qwen2", "AX650"),
        ("tiny-qwen2@s4", "AX650"),
        ("tiny-qwen2", "AX650"),
    ]
    assert any(target.board == "ax650" for target in found.targets)


def test_the_shipped_files_can_be_read() -> None:
    assert len(matrix.read(ROOT / "ci" / "matrix.toml").cells) == 2
    farm = matrix.read(ROOT / "ci" / "matrix-farm.toml")
    assert [cell.build for cell in farm.cells] == [
        ("qwen2-0.5b", "AX650"),
        ("qwen2-0.5b@s4", "AX650"),
        ("qwen2-0.5b", "AX620E"),
    ]


def test_board_yamls_are_relative_to_the_matrix_file(tmp_path: Path) -> None:
    names = [board_yaml(tmp_path, number) for number in (2, 3)]
    found = matrix.read(written(tmp_path, f'boards = {json.dumps(names)}\nmodels = ["tiny-qwen2"]\n'))
    assert [board.name for board in found.boards] == ["virtual-2", "virtual-3"]
    assert all(board.emulated and board.title.endswith(" (emulated)") for board in found.boards)
    assert len({board.state for board in found.boards}) == 2
    assert [model.name for model in found.models] == ["tiny-qwen2"]  # in its own type


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"virtual", ', '"virtuel", ', "line 2: no board is named 'virtuel': ci/boards/ has "),
        ('"ax650"]', '"virtual"]', "line 2: 'virtual' is twice in boards"),
        ('["tiny-qwen2"]', '["tiny-qwen"]', "line 3: no model is named 'tiny-qwen'"),
        ('["tiny-qwen2"]', '["tiny-qwen2@s4"]', "line 3: 'tiny-qwen2@s4' has a weight type: list it in weight_type"),
        ('["tiny-qwen2"]', "[]", "line 3: models is empty"),
        ('["tiny-qwen2"]', '"tiny-qwen2"', "line 3: models is 'tiny-qwen2', expected a list of names"),
        ('["tiny-qwen2"]', "[3]", "line 3: models is [3], expected a list of names"),
        (
            '  "s4",',
            '  "s5",',
            "line 6: no weight type is named 's5': there are fp32, fp16, bf16, s8, s4, fp8_e4m3, fp8_e5m2",
        ),
        ('  "s4",', '  "s8",', "line 6: 's8' is twice in weight_type"),
        ('models = ["tiny-qwen2"]\n', "", "line 1: models is missing"),
        ("# nights", "nights = 3", "line 1: 'nights' is not known: expected boards, models, weight_type"),
        ('board = "ax650"\n', 'bord = "ax650"\n', "line 10: 'bord' is not known: [[exclude]] has board, model"),
        (
            'board = "ax650"\n',
            'board = "ax630c"\n',
            "line 9: this exclusion matches no night of the matrix: board ax630c",
        ),
        ('reason = "not yet"\n', "", "line 9: this exclusion has no reason"),
        ('reason = "not yet"\n', "reason = 3\n", "line 12: reason is 3, expected text"),
        ('board = "ax650"\nweight_type = "s4"\n', 'model = "tiny-qwen2"\n', "line 9: every night is excluded"),
        ('board = "ax650"\nweight_type = "s4"\n', "", "line 9: this exclusion names no board"),
        ("[[exclude]]", "[exclude]", "line 9: exclude is not a list of tables: expected"),
        ("# nights", 'targets = "none.toml"', "line 1: targets is 'none.toml', expected an existing file"),
        ("models =", "models", "Expected '=' after a key in a key/value pair (at line 3, column 8)"),
    ],
)
def test_an_error_names_its_line(old: str, new: str, told: str, tmp_path: Path) -> None:
    assert PLAIN.count(old) == 1
    file = written(tmp_path, PLAIN.replace(old, new))
    with pytest.raises(BadInput) as caught:
        matrix.read(file)
    assert str(caught.value).startswith(str(file))
    assert told in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_one_name_is_one_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other.yaml").write_text((place.BOARDS / "ax650.yaml").read_text())
    file = written(tmp_path, 'models = ["tiny-qwen2"]\nboards = [\n  "ax650",\n  "other.yaml",\n]\n')
    with pytest.raises(BadInput, match=r"line 4: 'other\.yaml' has the board name ax650, like another"):
        matrix.read(file)
    monkeypatch.setenv("LG_BOARD_ADDRESS", "127.0.0.1")
    with pytest.raises(BadInput, match="line 2: LG_BOARD_ADDRESS would apply to all 2 boards"):
        matrix.read(written(tmp_path))


def test_a_file_that_is_not_toml(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"cannot read .*none.toml: No such file or directory"):
        matrix.read(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    with pytest.raises(BadInput, match=r"bytes.toml is not valid TOML: 'utf-8' codec can't decode"):
        matrix.read(tmp_path / "bytes.toml")


def test_every_night_that_cannot_be_held_is_named_before_any_is(tmp_path: Path) -> None:
    for number in range(preflight.UNJUDGED):
        history.append(tmp_path, night(number + 1, model="tiny-qwen2@s4", gates={}))
    text = PLAIN.replace('"ax650"]', '"ax650-farm"]')
    with pytest.raises(BadInput) as caught:
        matrix.plans(matrix.read(written(tmp_path, text)), tmp_path)
    said = str(caught.value).splitlines()
    assert said[0] == f"2 of 3 nights of {tmp_path / 'matrix.toml'} cannot run:"
    assert said[1].startswith(
        "tiny-qwen2@s4 on virtual (emulated): 5 nights of cpu bundles of tiny-qwen2@s4 on virtual"
    )
    assert said[2].endswith("invoke gate.record --board virtual --model tiny-qwen2@s4 --maker cpu")
    assert said[3] == "tiny-qwen2 on ax650: the board is in a farm: set its coordinator, LG_COORDINATOR=host:20408"


def test_the_nights_that_can_be_held_have_their_gates(tmp_path: Path) -> None:
    found = matrix.plans(matrix.read(written(tmp_path)), tmp_path)
    judged = {cell.name: not plan.unjudged for cell, plan in found.items()}
    assert judged == {
        "tiny-qwen2 on virtual (emulated)": True,
        "tiny-qwen2@s4 on virtual (emulated)": False,
        "tiny-qwen2 on ax650": False,
    }


def test_a_variant_has_a_name_of_its_own_only_in_another_type() -> None:
    assert variant.find("tiny-qwen2@s8") == variant.find("tiny-qwen2")
    other = variant.find("tiny-qwen2@s4")
    assert (variant.find("tiny-qwen2").name, other.name) == ("tiny-qwen2", "tiny-qwen2@s4")
    assert (variant.find("tiny-qwen2").flags(), other.flags()) == ([], ["--weight_type", "s4"])
    with pytest.raises(BadInput, match=r"no weight type is named 's44': .* \(did you mean s4\?\)"):
        variant.find("tiny-qwen2@s44")
    with pytest.raises(BadInput, match="no model is named ''"):
        variant.find("@s4")


def test_the_gates_of_a_variant_are_no_misspelling_of_its_models(tmp_path: Path) -> None:
    (tmp_path / "gates" / "virtual").mkdir(parents=True)
    (tmp_path / "gates" / "virtual" / "tiny-qwen2@s4.toml").write_text("")
    plan = preflight.check(
        place.find("virtual"), "tiny-qwen2", None, tmp_path, history.read(tmp_path, "virtual", "x"), tmp_path / "gates"
    )
    assert plan.unjudged

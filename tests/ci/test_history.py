"""The history of nights: append-only, whatever happened to the file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from axrun.errors import BadInput
from ci.nightly import history
from ci.nightly.history import Night

ROOT = Path(__file__).resolve().parents[2]


def night(number: int = 1, **said: object) -> Night:
    values = {
        "board": "virtual",
        "model": "tiny-qwen2",
        "started": f"2026-11-{number:02d}T02:00:00Z",
        "seconds": 61.5,
        "verdict": "green",
        "reason": "",
        "commit": "5b2a0a6",
        "maker": "cpu",
        "figures": {"decode_128": 20.0 + number},
        "layers": {"layer 0 prefill": [0.9999, 0.001]},
        **said,
    }
    return Night(**values)  # type: ignore[arg-type]


def test_nights_are_read_in_the_order_they_were_appended(tmp_path: Path) -> None:
    nights = tuple(night(number) for number in (1, 2, 3))
    files = {history.append(tmp_path, entry) for entry in nights}
    assert files == {tmp_path / "virtual" / "tiny-qwen2.jsonl"}
    assert history.read(tmp_path, "virtual", "tiny-qwen2") == (nights, ())
    assert history.read(tmp_path, "virtual", "other") == ((), ())


def test_a_torn_line_is_reported_and_nothing_is_rewritten(tmp_path: Path) -> None:
    file = history.append(tmp_path, night(1))
    whole = file.read_bytes()
    for length in (1, len(whole) // 2, len(whole) - 2):
        file.write_bytes(whole + whole[:length])
        torn = history.read(tmp_path, "virtual", "tiny-qwen2")
        assert torn.nights == (night(1),)
        assert len(torn.faults) == 1
        assert torn.faults[0].startswith(
            "tiny-qwen2.jsonl line 2 is skipped: not JSON, perhaps truncated by a crash: '{"
        )
        history.append(tmp_path, night(2))
        mended = history.read(tmp_path, "virtual", "tiny-qwen2")
        assert mended.nights == (night(1), night(2))
        assert mended.faults == torn.faults
        assert file.read_bytes().startswith(whole + whole[:length] + b"\n{")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"schema": 2}, "not a night of schema 1"),
        ({"verdict": "amber"}, "its verdict is 'amber'"),
        ({"figures": {"decode_128": "fast"}}, "its figures have 'decode_128': 'fast'"),
        ({"figures": {"decade_128": 1.0}}, "its figures have 'decade_128': 1.0"),
        ({"figures": {"decode_128": True}}, "its figures have 'decode_128': True"),
        ({"figures": {"decode_128": 1e300}}, "it has the number 1e+300"),
        ({"figures": {"decode_128": 1e16}}, "its figures have 'decode_128': 1e+16"),
        ({"figures": {"decode_128": float("nan")}}, "it has NaN, which is not a JSON number"),
        ({"figures": {"decode_128": 10**400}}, "it has the number 10000000000000000000... of 401 characters"),
        ({"seconds": 10**400}, "it has the number 10000000000000000000... of 401 characters"),
        ({"seconds": -1}, "its seconds is -1"),
        ({"board": "ax650"}, "it is of 'tiny-qwen2' on 'ax650'"),
        ({"model": "qwen2-0.5b"}, "it is of 'qwen2-0.5b' on 'virtual'"),
        ({"started": "9999-99-99T99:99:99Z"}, "its started is '9999-99-99T99:99:99Z'"),
        ({"started": "9999-12-31T23:59:59Z"}, "its started is '9999-12-31T23:59:59Z'"),
        ({"layers": {"layer 0 prefill": [1.0]}}, "its layers is"),
        ({"seconds": None}, "its seconds is None"),
        ({"blame": "weather"}, "its blame is 'weather'"),
        ({"sensors": {"soc 0, °C": ["hot"]}}, "its sensors is"),
        ({"commit": "--output=x"}, "its commit is '--output=x'"),
        ({"started": "yesterday"}, "its started is 'yesterday'"),
        ({"mood": "good"}, "it has blame, board, commit,"),
    ],
)
def test_a_line_that_is_no_night_is_left_out_with_its_reason(
    change: dict[str, object], told: str, tmp_path: Path
) -> None:
    file = history.append(tmp_path, night(1))
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}) + "\n")
    history.append(tmp_path, night(2))
    found = history.read(tmp_path, "virtual", "tiny-qwen2")
    assert found.nights == (night(2),)
    assert len(found.faults) == 1
    assert told in found.faults[0]


def test_writers_at_once_each_get_their_line(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ci.nightly import history; "
        "from tests.ci.test_history import night\n"
        "for number in range(20): history.append(Path(sys.argv[1]), night(1, reason=sys.argv[2] * 5000))"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), letter], cwd=ROOT, env={**os.environ})
        for letter in "abc"
    ]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    nights, faults = history.read(tmp_path, "virtual", "tiny-qwen2")
    assert faults == ()
    assert sorted(entry.reason[0] for entry in nights) == sorted("abc" * 20)


def test_a_figure_that_is_no_number_is_not_written(tmp_path: Path) -> None:
    for value in (float("nan"), float("inf"), 10**400, 1e300):
        with pytest.raises(BadInput, match=r"this night is not a valid line of .*tiny-qwen2\.jsonl: it"):
            history.append(tmp_path, night(figures={"decode_128": value}))
    with pytest.raises(BadInput, match="its stage is 1"):
        history.append(tmp_path, night(stage=1))
    assert history.read(tmp_path, "virtual", "tiny-qwen2").nights == ()


def test_a_place_that_cannot_be_written_is_an_error_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "virtual").write_text("a file")
    with pytest.raises(BadInput, match=r"cannot add to .*tiny-qwen2\.jsonl: "):
        history.append(tmp_path, night())
    with pytest.raises(BadInput, match="not a valid name of a board"):
        history.append(tmp_path, night(board="../virtual"))


def test_the_last_green_night_and_the_measured_ones_of_a_maker() -> None:
    nights = [night(1), night(2, verdict="red"), night(3, maker="pulsar2"), night(4, verdict="red", figures={})]
    assert history.last_green(nights) == nights[2]
    assert history.last_green(nights[3:]) is None
    assert history.measured(nights, "cpu") == nights[:2]

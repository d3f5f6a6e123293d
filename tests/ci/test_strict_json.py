"""Strict JSON: values that later arithmetic would fail on are refused when read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ci.device import strict_json


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("NaN", "it has NaN"),
        ("[-Infinity]", "it has -Infinity"),
        ("1e999", "it has the number 1e999"),
        ("9" * 400, "it has the number 99999999999999999999... of 400 characters"),
        ("9" * 5000, "of 5000 characters"),
        (str(2**63), "it has the number"),
        ("[" * 100_000, "it is nested too deeply"),
        ("{", "Expecting property name"),
    ],
)
def test_numbers_beyond_64_bits_and_nan_are_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why.replace("[", r"\[").replace(".", r"\.")):
        strict_json.loads(text)


def test_the_rest_is_read_as_python_reads_it() -> None:
    value = {"a": [1, -(2**53), 0.1, -1e-300, 1e17, True, None, "é"]}
    assert strict_json.loads(json.dumps(value)) == value


def test_a_file_is_bounded_and_an_object(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    assert strict_json.read_or_nothing(file) == {}
    file.write_text('{"a": 1}')
    assert strict_json.read(file, 8) == {"a": 1}
    with pytest.raises(ValueError, match="more than 7 bytes"):
        strict_json.read(file, 7)
    file.write_text("[1]")
    with pytest.raises(ValueError, match="not a JSON object"):
        strict_json.read(file)


def test_plain_values_read_back() -> None:
    value = {"nan": float("nan"), "inf": [float("-inf")], "huge": 10**400, "well": (1, 2.5, True)}
    kept = strict_json.plain(value)
    assert strict_json.loads(json.dumps(kept)) == kept
    assert kept == {"nan": "nan", "inf": ["-inf"], "huge": "an integer of 1329 bits", "well": [1, 2.5, True]}

"""What llm_build prints: notes on defaults, the config with its rope, short texts on one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from axc import check
from axc.budget import Budget, megabytes
from axc.cli import main
from axc.rope import Rope
from axrun.format.bundle import read_manifest


def test_defaults_are_noted_and_the_rope_is_shown(
    tiny_qwen2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["llm_build", "--input_path", str(tiny_qwen2), "--output_path", str(tmp_path / "a"), "-c", "-1"]
    assert main([*command, "--chip", "AX630C"]) == 0
    shown = capsys.readouterr().out
    assert "note: the context, prompt and answer, is 127 tokens: for more, set --kv_cache_len" in shown
    assert "note: the prompt is processed token by token: to process it in chunks, set --prefill_len" in shown
    assert "rope=Rope(theta=" in shown
    assert "check skipped: --check_level -1" in shown
    assert "check done" not in shown
    assert read_manifest(tmp_path / "a")["flags"]["chip"] == "AX620E"
    assert main([*command, "--chip", "AX620E", "--kv_cache_len", "127", "--prefill_len", "0"]) == 0
    again = capsys.readouterr().out
    assert "already this bundle" in again
    assert "note: " not in again


@pytest.mark.parametrize(
    ("rope", "shown"),
    [
        (Rope(1e4), "Rope(theta=10000.0)"),
        (Rope(1e6, "linear", 4.0, partial=0.5), "Rope(theta=1000000.0, kind='linear', factor=4.0, partial=0.5)"),
        (Rope(1e4, "longrope", divisors=(1.0,) * 48), "Rope(theta=10000.0, kind='longrope', divisors=[48])"),
    ],
)
def test_a_rope_shows_what_differs_from_the_defaults(rope: Rope, shown: str) -> None:
    assert str(rope) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [("42", "42"), ("né ok", "né ok"), ("a\nb", "'a\\nb'"), (" a", "' a'"), ("\x1b[2J", "'\\x1b[2J'"), ("", "")],
)
def test_an_answer_is_shown_on_one_line(text: str, shown: str) -> None:
    assert check._quoted(text) == shown


@pytest.mark.parametrize(
    ("found", "end"),
    [((2, 2, False), "prefix"), ((1, 2, True), "prefix"), ((1, 2, False), "near ties, which rounding decides: passed")],
)
def test_different_tokens_that_pass_are_explained(found: Any, end: str) -> None:
    assert check._agreement(*found).endswith(end)


def test_sizes() -> None:
    assert [megabytes(count) for count in (0, 1, 999_999, 1_000_000, 2_500_000_000)] == [
        "0 kB",
        "1 kB",
        "1000 kB",
        "1 MB",
        "2,500 MB",
    ]
    assert "of memory in 1 process" in Budget(1, 1, 1).text()
    assert "of memory in each of 2 processes" in Budget(1, 1, 2).text()

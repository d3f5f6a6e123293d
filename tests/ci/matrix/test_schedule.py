"""Nights of several boards run in parallel, all builds one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

from ci.nightly import matrix
from ci.nightly.matrix import Cell, Matrix
from ci.nightly.matrix_run import CellResult, Run
from ci.nightly.report.matrix import Page
from tests.ci.matrix.matrices import PLAIN, SECONDS, acting, noted, written


def spans(log: Path) -> dict[str, tuple[float, float]]:
    found: dict[str, list[float]] = {}
    for what, _, when, _ in noted(log):
        found.setdefault(what, []).append(when)
    return {what: (times[0], times[-1]) for what, times in found.items()}


def overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def run(found: Matrix, folder: Path, codes: Callable[[Cell], int | None], said: list[str]) -> list[CellResult]:
    folder.mkdir()
    return Run(found, folder, acting(folder / "log", -SECONDS, codes), said.append).run()


def test_boards_go_at_the_same_time_their_nights_and_all_builds_one_by_one(tmp_path: Path) -> None:
    found = matrix.read(written(tmp_path, PLAIN.partition("[[exclude]]")[0]))
    said: list[str] = []
    ran = run(found, tmp_path / "run", lambda cell: 0, said)
    assert [(entry.cell, entry.code) for entry in ran] == [(cell, 0) for cell in found.cells]
    at = spans(tmp_path / "run" / "log")
    builds = [what for what in at if what.startswith("build")]
    assert builds == [  # each once, for both boards
        *("build tiny-qwen2 AX650", "build package virtual", "build package ax650", "build tiny-qwen2@s4 AX650")
    ]
    assert not any(overlap(at[one], at[other]) for one, other in itertools.pairwise(builds))
    for board in ("virtual", "ax650"):
        assert not overlap(at[f"{board} tiny-qwen2"], at[f"{board} tiny-qwen2@s4"])
        assert at[builds[0]][1] < at[f"{board} tiny-qwen2"][0]
        assert at[builds[3]][1] < at[f"{board} tiny-qwen2@s4"][0]
        assert at[f"build package {board}"][1] < at[f"{board} tiny-qwen2"][0]
    assert overlap(at["virtual tiny-qwen2"], at["ax650 tiny-qwen2"])
    assert "[virtual tiny-qwen2] virtual tiny-qwen2 speaks" in said
    assert "[build tiny-qwen2 for AX650] build tiny-qwen2 AX650 speaks" in said
    assert not (tmp_path / "run" / "builds").exists()


def test_one_night_that_fails_stops_no_other(tmp_path: Path) -> None:
    codes = {
        "tiny-qwen2 on virtual (emulated)": 1,
        "tiny-qwen2@s4 on virtual (emulated)": 0,
        "tiny-qwen2 on ax650": None,
    }
    ran = run(matrix.read(written(tmp_path)), tmp_path / "run", lambda cell: codes[cell.name], [])
    assert [(entry.code, entry.reason) for entry in ran] == [
        (1, "it is slow"),
        (0, ""),
        (2, "it ended with exit code 2: no such thing"),
    ]
    page = Page(matrix.read(tmp_path / "matrix.toml"), ran, "2026-11-03T02:00:00Z", 1.0, tmp_path)
    assert page.code == 1
    assert page.headline == (
        "red: 2 of 3 nights on 2 boards: tiny-qwen2 on virtual (emulated): it is slow (and 1 more)"
    )

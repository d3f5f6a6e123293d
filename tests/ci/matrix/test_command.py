"""`invoke nightly --matrix` as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from ci.nightly import history, nights, run_folder
from tests.ci.matrix.matrices import MARK, ROOT, SECONDS, board_yaml, left, written
from tests.ci.test_report import Outline


def start(folder: Path, *flags: str) -> subprocess.Popen[str]:
    """`invoke nightly --matrix` itself."""
    words = ["--matrix", str(folder / "matrix.toml"), "--out", str(folder / "out"), *flags]
    return subprocess.Popen(
        [sys.executable, "-m", "invoke", "nightly", *words],
        cwd=ROOT,
        env={**os.environ, MARK: str(folder), "XDG_STATE_HOME": str(folder / "state")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def test_a_failed_build_fails_its_nights_without_reserving_boards(tmp_path: Path) -> None:
    names = [board_yaml(tmp_path, number) for number in (2, 3)]
    written(tmp_path, f'boards = {json.dumps(names)}\nmodels = ["tiny-qwen2"]\n')
    process = start(tmp_path, "--limit", "build=0.1")
    out, said = process.communicate(timeout=10 * SECONDS)
    lines = out.splitlines()
    why = "build: build did not end within 0 s; last output: "
    assert lines[0].startswith(f"red: 2 of 2 nights on 2 boards: tiny-qwen2 on virtual-2 (emulated): {why}"), said
    assert process.returncode == 1
    assert left(str(tmp_path)) == []
    assert "reserve" not in said
    assert "build package" not in said
    assert not (tmp_path / "state" / "axc" / "boards" / "virtual-2").exists()
    for board in ("virtual-2", "virtual-3"):
        (held,) = history.read(tmp_path / "out" / "nightly" / "history", board, "tiny-qwen2").nights
        assert (held.verdict, held.stage) == ("red", "build")
        assert f"[{board} tiny-qwen2] build failed after " in said
    (folder,) = (tmp_path / "out" / "nightly" / "matrix").iterdir()
    outline = Outline((folder / "matrix.html").read_text())
    reports = [folder / (link["href"] or "") for link in outline.of("a") if "report" in (link["href"] or "")]
    assert len(reports) == 2
    assert all(report.is_file() for report in reports)
    site = tmp_path / "out" / "nightly" / "history" / "site"
    assert "red: 2 of 2 boards and models: tiny-qwen2 on virtual-2" in (site / "index.html").read_text()
    assert len(list((site / "reports").rglob("*.html"))) == 2


def test_a_matrix_that_is_ended_leaves_nothing_running(tmp_path: Path) -> None:
    names = [board_yaml(tmp_path, number) for number in (2, 3)]
    written(tmp_path, f'boards = {json.dumps(names)}\nmodels = ["tiny-qwen2"]\n')
    process = start(tmp_path)
    assert process.stderr
    said: list[str] = []
    while not said or said[-1] != "[build tiny-qwen2 for AX650] build ...":
        said.append(process.stderr.readline().rstrip("\n"))
        assert process.poll() is None, said
    process.send_signal(signal.SIGTERM)
    out, rest = process.communicate(timeout=SECONDS)
    why = "not held: SIGTERM ended the matrix"
    assert out.startswith(f"red: 2 of 2 nights on 2 boards: tiny-qwen2 on virtual-2 (emulated): {why} (and 1 more)\n")
    assert "[build tiny-qwen2 for AX650] build interrupted after " in rest
    assert process.returncode == 2
    assert left(str(tmp_path)) == []


def test_a_matrix_and_a_board_do_not_go_together(tmp_path: Path) -> None:
    written(tmp_path)
    process = start(tmp_path, "--board", "virtual")
    out, said = process.communicate(timeout=SECONDS)
    assert (process.returncode, out) == (2, "")
    assert "error: --board and --matrix exclude each other: a matrix names its boards" in said


def test_a_failed_update_of_the_site_is_only_a_note(tmp_path: Path) -> None:
    said: list[str] = []
    nights.update_site(tmp_path / "none", tmp_path, said.append)
    (note,) = said
    assert note.startswith(f"note: the site was not updated: no history in {tmp_path / 'none'}: name the folder")
    assert run_folder.new(tmp_path / "runs", "2026-11-03T02:00:00Z", 3).name == "20261103T020000Z"
    assert run_folder.new(tmp_path / "runs", "2026-11-03T02:00:00Z", 3).name == "20261103T020000Z-2"
    for day in range(4, 8):
        run_folder.new(tmp_path / "runs", f"2026-11-{day:02d}T02:00:00Z", 3)
    assert len(list((tmp_path / "runs").iterdir())) == 3

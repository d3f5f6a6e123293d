"""A matrix that is ended by a signal, or whose scheduler is killed, leaves nothing running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ci.matrix.matrices import MARK, ROOT, SECONDS, board_yaml, left, noted, until, written

DRIVER = """
import sys
from pathlib import Path
from ci.nightly import matrix
from ci.nightly.matrix_run import Run
from tests.ci.matrix.matrices import acting
folder = Path(sys.argv[1])
ran = Run(matrix.read(folder / "matrix.toml"), folder, acting(folder / "log", 100, lambda cell: 0), print).run()
for entry in ran:
    print(f"{entry.code} {entry.reason}")
"""


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run of two boards whose bundles are built, and whose nights would take long."""
    names = [board_yaml(tmp_path, number) for number in (2, 3)]
    written(tmp_path, f'boards = {json.dumps(names)}\nmodels = ["tiny-qwen2"]\nweight_type = ["s8", "s4"]\n')
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, MARK: str(tmp_path), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_nights_and_is_reported(
    number: signal.Signals, driver: subprocess.Popen[str], tmp_path: Path
) -> None:
    until(lambda: noted(tmp_path / "log"))
    driver.send_signal(number)
    said = driver.communicate(timeout=SECONDS)[0].splitlines()
    assert [(what, word) for what, word, _, _ in noted(tmp_path / "log")] == [
        ("build tiny-qwen2 AX650", "begins"),
        ("build tiny-qwen2 AX650", "SIGTERM"),
    ]
    assert said[-4:] == [f"2 not held: {number.name} ended the matrix"] * 4
    assert left(str(tmp_path)) == []


def test_nights_end_when_the_scheduler_is_killed(driver: subprocess.Popen[str], tmp_path: Path) -> None:
    until(lambda: noted(tmp_path / "log"))
    driver.kill()
    until(lambda: left(str(tmp_path)) == [])
    assert noted(tmp_path / "log")[-1][:2] == ("build tiny-qwen2 AX650", "SIGTERM")

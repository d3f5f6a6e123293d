"""A run of tests/hil in which no test reached a board is never green."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.nightly.conftest import ROOT, Desk

pytestmark = pytest.mark.system


def hil(desk: Desk, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "tests/hil", "-p", "no:cacheprovider", *flags],
        cwd=ROOT,
        env=desk.variables(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_without_a_board_the_error_says_how_to_select_one(desk: Desk) -> None:
    done = hil(desk)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "no board was named: --lg-env ci/boards/virtual.yaml" in done.stderr + done.stdout


@pytest.mark.parametrize("flags", [["-k", "no_such_test"], ["--collect-only"], ["-m", "system"]])
def test_a_run_without_tests_fails(flags: list[str], desk: Desk, tmp_path: Path) -> None:
    done = hil(desk, "--lg-env", str(desk.yaml("hil")), *flags)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert "error: no test ran on a board" in done.stdout


def test_an_unknown_board_is_refused(desk: Desk) -> None:
    done = hil(desk, "--lg-env", "virtuel.yaml")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "no board is named 'virtuel.yaml'" in done.stderr + done.stdout


def test_a_board_that_is_off_fails(desk: Desk) -> None:
    done = hil(desk, "--lg-env", str(desk.yaml("off")))
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert "virtual does not answer over SSH" in done.stdout

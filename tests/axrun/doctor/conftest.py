"""Fixtures: a bundle with figures, built once, and copies of it to damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from axc.logits import Options, write
from axrun.doctor.context import Context
from axrun.doctor.examine import examine
from axrun.doctor.installed import look
from axrun.doctor.report import Finding, Report
from axrun.format.bundle import Bundle

Examiner = Callable[..., Report]


@pytest.fixture(scope="session")
def examined(bundle_s8: Path, tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A healthy bundle with reference logits and figures; read-only."""
    bundle = shutil.copytree(bundle_s8, tmp_path_factory.mktemp("examined") / "tiny")
    options = Options(tiny_qwen2, tiny_qwen2 / "heldout.txt", bundle=bundle, tokens=64, window=32, greedy_tokens=2)
    write(options)
    return bundle


@pytest.fixture
def copy(examined: Path, tmp_path: Path) -> Path:
    return shutil.copytree(examined, tmp_path / "tiny")


@pytest.fixture(scope="session")
def installed() -> object:
    """The installed engines of this machine, queried once."""
    return look()


@pytest.fixture
def context(installed: object) -> Callable[[Path], Context]:
    def opened(bundle: Path) -> Context:
        return Context(Bundle.open(bundle), "ax", None, installed, lambda line: None)  # type: ignore[arg-type]

    return opened


@pytest.fixture
def found(installed: object) -> Callable[[Path], Finding]:
    """Runs the doctor on a faulty bundle; returns its finding."""

    def finding(bundle: Path) -> Finding:
        report = examine(bundle, "ax", installed=installed)  # type: ignore[arg-type]
        assert report.finding is not None, list(report.lines())
        assert report.exit_code == 1
        return report.finding

    return finding

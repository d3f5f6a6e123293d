"""tiny-qwen2, calibrated on a text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from axc.calibration import run
from tests.axc.calibration.calibrations import options


@pytest.fixture(scope="session")
def words(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to calibrate on: the first half of the held-out one, whose second half is measured on."""
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text((tiny_qwen2 / "heldout.txt").read_text()[:6000])
    return path


@pytest.fixture(scope="session")
def calibrated(tiny_qwen2: Path, words: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """tiny-qwen2 in 4 bits, in 5.5 and in 8."""
    folder = tmp_path_factory.mktemp("calibrated")
    asked: dict[str, dict[str, Any]] = {"4": {}, "5.5": {"bits": 5.5}, "8": {"weight_type": "s8"}}
    return {
        name: run.calibrate(options(tiny_qwen2, words, **more), folder / f"{name}.safetensors")
        for name, more in asked.items()
    }

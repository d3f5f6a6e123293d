"""Scales that are no rounding's: infinite ones, and those that leave no levels, of every form that scales have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from axrun.doctor import constants
from axrun.format import axmodel
from axrun.format.dtypes import from_float32
from axrun.format.quantised import pack4

ROWS, BLOCK = 7, 32


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("scale_dtype", ["FLOAT", "FLOAT16"])
@pytest.mark.parametrize("kind", ["INT4", "INT8"])
def test_scales(linear_file: Callable[..., Path], kind: str, scale_dtype: str, zeros: bool) -> None:
    random = np.random.default_rng(0)
    largest, top = {"INT4": (7, 2), "INT8": (127, 50)}[kind]
    levels = random.integers(-largest, largest, (ROWS, 3 * BLOCK), np.int8, endpoint=True)
    levels[:, ::BLOCK] = -largest
    points = random.integers(0, largest, (ROWS, 3), np.int8, endpoint=True)  # -largest lies far below
    scales = random.uniform(0.1, 1, (ROWS, 3)).astype(np.float32)

    def said() -> str:
        stored = [pack4(each) if kind == "INT4" else each for each in (levels, points)]
        parts = [(kind, levels.shape, stored[0]), (scale_dtype, scales.shape, from_float32(scales, scale_dtype))]
        more = [(kind, points.shape, stored[1])] if zeros else []
        model = axmodel.read(linear_file([*parts, *more], axis=1, block_size=BLOCK))
        return " ".join(constants.unfit_scales(model) or ())

    assert said() == ""
    scales[5, 1] = np.inf
    assert "inf at row 5, block 1" in said()
    scales[5, 1] = 1
    points[4, 2] = 3 if zeros else 0
    levels[4, 2 * BLOCK :] = points[4, 2] - top
    assert f"{top}{' from the zero point' if zeros else ''} in row 4, block 2" in said()

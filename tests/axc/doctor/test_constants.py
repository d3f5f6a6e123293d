"""Causes of different rotary tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from axc.doctor import constants

HALF, POSITIONS, BASE = 16, 200, 10000.0
Tables = tuple[Any, Any]


def tables(base: float = BASE, factor: float = 1.0, first: int = 0) -> Tables:
    angles = (np.arange(POSITIONS) + first)[:, None] * (base ** (-np.arange(HALF) / HALF))[None] / factor
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def from_position(first: int) -> Tables:
    cos, sin = tables()
    cos[first:] = 0
    return cos, sin


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (
            lambda: tables(base=20000.0),
            "the base of the rotary embedding is 20000, rope_theta of the checkpoint is 10000",
        ),
        (lambda: tables(factor=4.0), "divided by 4"),
        (lambda: tables(first=1), "shifted by 1: position 0 has the angles of position 1"),
        (lambda: tables()[::-1], "cos and sin are swapped"),
        (lambda: (tables()[0], -tables()[1]), "opposite direction"),
        (lambda: (tables()[0] * 1.2, tables()[1] * 1.2), "scaled by 1.2"),
        (lambda: from_position(128), "zero from position 128 on"),
    ],
)
def test_a_different_table_is_explained(made: Callable[[], Tables], said: str) -> None:
    (found,) = constants.angles(("rotary.cos", "rotary.sin"), *made(), *tables())
    assert said in found.cause


def test_float32_angles_are_not_a_difference() -> None:
    inverse = (BASE ** (-np.arange(HALF, dtype=np.float32) / HALF)).astype(np.float32)
    rounded = np.arange(POSITIONS, dtype=np.float32)[:, None] * inverse[None]
    assert not list(constants.angles(("cos", "sin"), np.cos(rounded), np.sin(rounded), *tables()))

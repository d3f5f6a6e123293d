"""A planted fault, and the finding that a doctor must report for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Fault:
    """A fault that `plant(bundle, checkpoint)` makes in a copy of the healthy bundle `base` of conftest.py.

    `stage`: a pattern of the stages that may report it. `file`: the file to be named, or several separated by |;
    `{layer0}` and `{layer}` are the axmodels of layers 0 and 1, `{post}` is the post model. `part`: a pattern in the
    finding's part. `says`: a pattern in its part, seen and cause. `alone`: `axrun doctor` finds it too, without the
    checkpoint.
    """

    name: str
    base: str
    stage: str
    file: str
    plant: Callable[[Path, Path], None]
    part: str = ""
    says: str = ""
    alone: bool = True


@dataclass(frozen=True)
class RunnerFault:
    """A fault of the runner or its engine that `plant` patches in; the bundle is unchanged."""

    name: str
    base: str
    stage: str
    plant: Callable[[pytest.MonkeyPatch], None]
    part: str = ""
    says: str = ""
    alone: bool = True

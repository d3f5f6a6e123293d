"""A planted fault, and the finding that a doctor must report for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Fault:
    """A fault that `plant(bundle, checkpoint)` makes, in a copy of the healthy bundle `base` of conftest.py.

    `stage` is a pattern of the stages that may find it first. `file` says where it lies, several between bars:
    `{layer0}` and `{layer}` are the axmodels of layers 0 and 1, `{post}` the post model. `part` is a pattern found in
    the finding's part, `says` one found in its part, what it saw and its cause. `alone`: found without a checkpoint
    too, by what a build left of the reference.
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
    """A fault of the runner or its engine, which `plant` puts in place for a test; the bundle is as it was built."""

    name: str
    base: str
    stage: str
    plant: Callable[[pytest.MonkeyPatch], None]
    part: str = ""
    says: str = ""
    alone: bool = True

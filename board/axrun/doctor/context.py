"""Data shared by the stages: the bundle, its figures, and the engine."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass

from axrun.doctor import figures as stored
from axrun.doctor.figures import Figures
from axrun.doctor.installed import Installed
from axrun.doctor.stages import NotExamined, Say
from axrun.format.bundle import Bundle
from axrun.session import libax_engine

OURS = "cpu"  # `maker` of our own axmodels
OTHERS = {"ax": "ort", "ax-int8": "ort", "ort": "ax"}  # for each engine, one that shares no code with it


@dataclass
class Context:
    """`installed` describes this machine. `say` receives progress lines of a stage."""

    bundle: Bundle
    engine: str
    threads: int | None
    installed: Installed
    say: Say

    @functools.cached_property
    def figures(self) -> Figures:
        """The figures. Raises NotExamined if the bundle has none, BadInput if they are damaged or of another bundle."""
        if stored.NAME not in self.bundle.manifest["files"]:
            raise NotExamined("the bundle has no figures to compare with: `axc reference --bundle` stores them")
        return stored.read(self.bundle.path / stored.NAME, self.bundle)

    def expect_runnable(self) -> None:
        """Raises NotExamined if this machine cannot run the bundle's axmodels."""
        if self.bundle.maker != OURS and self.installed.vendors is None:
            raise NotExamined(f"made by {self.bundle.maker} for an NPU, which this machine does not have")

    @property
    def other_engine(self) -> str:
        """An installed engine that shares no code with the one in use; empty if there is none."""
        other = OTHERS.get(self.engine, "") if self.bundle.maker == OURS else ""
        there = importlib.util.find_spec("onnxruntime") if other == "ort" else libax_engine.is_there()
        return other if other and there else ""

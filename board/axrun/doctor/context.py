"""What the stages of a doctor on a board share: the bundle, the figures in it, and the engine."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass

from axrun.doctor import figures as stored
from axrun.doctor.figures import Figures
from axrun.doctor.installed import Installed
from axrun.doctor.walk import NotExamined, Say
from axrun.format.bundle import Bundle
from axrun.session import libax_engine

OURS = "cpu"  # the maker of our own axmodels
OTHERS = {"ax": "ort", "ax-int8": "ort", "ort": "ax"}  # an engine that shares no code with each


@dataclass
class Context:
    """`installed` is what this machine has. `say` gets a line while a stage works."""

    bundle: Bundle
    engine: str
    threads: int | None
    installed: Installed
    say: Say

    @functools.cached_property
    def figures(self) -> Figures:
        """Raises NotExamined where the bundle has none, BadInput where they are damaged or of another bundle."""
        if stored.NAME not in self.bundle.manifest["files"]:
            raise NotExamined("the bundle holds no figures to compare with: `axc reference --bundle` leaves them")
        return stored.read(self.bundle.path / stored.NAME, self.bundle)

    def expect_runnable(self) -> None:
        """Raises NotExamined where this machine cannot run the bundle's axmodels."""
        if self.bundle.maker != OURS and self.installed.vendors is None:
            raise NotExamined(f"made by {self.bundle.maker} for an NPU, which this machine does not have")

    @property
    def other_engine(self) -> str:
        """One that shares no code with the engine in use and is there; empty where there is none."""
        other = OTHERS.get(self.engine, "") if self.bundle.maker == OURS else ""
        there = importlib.util.find_spec("onnxruntime") if other == "ort" else libax_engine.is_there()
        return other if other and there else ""

"""The contract between the runner and whatever executes an axmodel.

It follows the vendor's C interface: a session has shape groups, a group has named inputs and outputs, and memory
belongs to the caller, who allocates it once, binds it once and then only runs. So the K/V of a layer is one buffer that
all its groups read, and the `output` of one layer is the `input` of the next: nothing is copied or allocated per token.

bfloat16 travels as numpy uint16 (`axrun.format.dtypes`).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from axrun.errors import BadInput
from axrun.format.axmodel import TensorInfo

Array = NDArray[Any]

CACHES = ("K_cache", "V_cache")


@dataclass(frozen=True)
class SessionGroup:
    """A shape group, its dimensions as numbers.

    Where `history` is 0, K_cache and V_cache are not among the inputs: nothing would be read from them.
    """

    index: int
    tokens: int
    history: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


class Binding(Protocol):
    """A group whose inputs and outputs have their memory."""

    def run(self) -> None:
        """Reads the bound inputs, fills the bound outputs.

        Raises NotFinite, the outputs filled all the same, when one of them holds an infinity or a NaN.
        """


class Session(Protocol):
    """One axmodel, loaded. `flexible`: its bindings may have any numbers of tokens and history, not only a group's."""

    @property
    def flexible(self) -> bool: ...

    @property
    def groups(self) -> tuple[SessionGroup, ...]: ...

    @property
    def window(self) -> int:
        """Of how many tokens back, itself among them, a token of this layer may see the rows; 0: of all."""

    def allocate(self, info: TensorInfo) -> Array:
        """Zeroed memory for an input or output, where the engine can work on it."""

    def bind(self, group: int, arrays: Mapping[str, Array]) -> Binding:
        """Ties allocated arrays, or leading parts of them, to the inputs and outputs of a group.

        Every input must be given; an output that is not is not delivered. The binding keeps the arrays alive.
        Raises ValueError for a name, type or shape that the group does not have.
        """


# ax: libax_engine, ours or a board's; ax-int8: ours with 8-bit activations, faster and less exact;
# ort: onnxruntime, the independent cross-check of our axmodels.
ENGINES = {"ax": "axrun.session.ax_engine", "ax-int8": "axrun.session.ax_int8", "ort": "axrun.session.ort"}


def usual_engine() -> str:
    """The engine to take when nobody asks for one: ax, unless this machine has onnxruntime and no libax_engine."""
    from axrun.session import libax_engine

    return "ort" if importlib.util.find_spec("onnxruntime") and not libax_engine.is_there() else "ax"


def open_session(path: str | os.PathLike[str], engine: str = "ax", threads: int | None = None) -> Session:
    """Loads an axmodel; `threads` None is one for each CPU this process may use.

    Raises BadInput when the engine is unknown or not installed, or cannot load the file.
    """
    if threads is not None and not 1 <= threads <= 1024:
        raise BadInput(f"{threads} threads; expected 1 to 1024")
    if engine not in ENGINES:
        raise BadInput(f"unknown engine {engine!r}; there are: {', '.join(sorted(ENGINES))}")
    session: Session = importlib.import_module(ENGINES[engine]).open_session(path, threads)
    return session


def engine_version(engine: str) -> str:
    """The version of an engine that is installed."""
    return str(importlib.import_module(ENGINES[engine]).version())

"""The interface between the runner and the engines that execute axmodels.

It follows the vendor's C interface: a session has shape groups, and a group has named inputs and outputs. The caller
allocates memory once, binds it once, and then only runs. All groups of a layer share one KV buffer, and the `output`
buffer of a layer is the `input` of the next: nothing is copied or allocated per token.

bfloat16 arrays have the numpy type uint16 (`axrun.format.dtypes`).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from axrun.errors import BadInput
from axrun.format.axmodel import TensorInfo

Array = NDArray[Any]

CACHES = ("K_cache", "V_cache")

# axc_segment of axc_engine.h: the rows of one sequence in a run over several, with the addresses of its memory.
SEGMENT = np.dtype([("tokens", "<u4"), ("history", "<u4"), ("mask", "<u8"), ("K_cache", "<u8"), ("V_cache", "<u8")])


@dataclass(frozen=True)
class SessionGroup:
    """A shape group with numeric dimensions.

    If `history` is 0, K_cache and V_cache are not among the inputs.
    """

    index: int
    tokens: int
    history: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


class Binding(Protocol):
    """A group with memory bound to its inputs and outputs."""

    def run(self) -> None:
        """Computes the bound outputs from the bound inputs.

        Raises NotFinite if an output holds an infinity or a NaN; the outputs are complete even then.
        """


class StackedBinding(Protocol):
    """Memory for rows of several sequences, bound to the inputs and outputs of a session."""

    def run(self, segments: int, count: int) -> None:
        """Runs the first rows of the bound arrays: those of `count` segments at the address `segments`, stacked.

        The new rows of K and V are also written to the caches, behind the history. Raises NotFinite as Binding.run;
        the rows of the other sequences are then complete.
        """


class Session(Protocol):
    """A loaded axmodel.

    `stacks`: one run may take rows of several sequences (`bind_stacked`).
    `flexible`: bindings may have any number of tokens and history, not only those of a group. `exact`: the outputs of a
    token do not depend on the other tokens of its run, to the bit.
    """

    @property
    def flexible(self) -> bool: ...

    @property
    def exact(self) -> bool: ...

    @property
    def stacks(self) -> bool: ...

    @property
    def groups(self) -> tuple[SessionGroup, ...]: ...

    @property
    def window(self) -> int:
        """The attention window of this layer in tokens, including the token itself; 0: unlimited."""

    def allocate(self, info: TensorInfo) -> Array:
        """Zeroed memory for an input or output, accessible to the engine."""

    def bind(self, group: int, arrays: Mapping[str, Array]) -> Binding:
        """Binds allocated arrays, or leading parts of them, to the inputs and outputs of a group.

        All inputs must be given; missing outputs are discarded. The binding keeps the arrays alive.
        Raises ValueError for a name, type or shape that the group does not have.
        """

    def bind_stacked(self, arrays: Mapping[str, Array]) -> StackedBinding:
        """Binds allocated arrays [1, rows, ...] for runs of up to `rows` rows; without masks and caches.

        The binding keeps the arrays alive. Raises ValueError if the session does not stack rows.
        """


# ax: libax_engine, ours or a board's; ax-int8: ours with 8-bit activations, faster and less exact;
# ort: onnxruntime, the independent cross-check of our axmodels.
ENGINES = {"ax": "axrun.session.ax_engine", "ax-int8": "axrun.session.ax_int8", "ort": "axrun.session.ort"}


def usual_engine() -> str:
    """The default engine: ax, unless this machine has onnxruntime and no libax_engine."""
    from axrun.session import libax_engine

    return "ort" if importlib.util.find_spec("onnxruntime") and not libax_engine.is_there() else "ax"


def open_session(path: str | os.PathLike[str], engine: str = "ax", threads: int | None = None) -> Session:
    """Loads an axmodel. `threads` None: one per CPU this process may use.

    Raises BadInput if the engine is unknown or not installed, or cannot load the file.
    """
    if threads is not None and not 1 <= threads <= 1024:
        raise BadInput(f"{threads} threads; expected 1 to 1024")
    if engine not in ENGINES:
        raise BadInput(f"unknown engine {engine!r}; there are: {', '.join(sorted(ENGINES))}")
    session: Session = importlib.import_module(ENGINES[engine]).open_session(path, threads)
    return session


def engine_version(engine: str) -> str:
    """The version of an installed engine."""
    return str(importlib.import_module(ENGINES[engine]).version())

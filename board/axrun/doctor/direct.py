"""Runs a single layer directly through the session, with its own positions, masks and history.

No code of the runner's decoder is used, so errors seen here are those of the axmodel or the engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from axrun.decoder import PLAIN
from axrun.errors import BadInput, NotFinite
from axrun.format.axmodel import BLOCKED, TensorInfo
from axrun.format.dtypes import FLOATS, from_float32, to_float32
from axrun.session import CACHES, Array, Session, open_session

Floats = NDArray[np.float32]

OUTPUTS = ("K_cache_out", "V_cache_out", "output")
INPUTS = ("indices", "input", "mask")


class Result(NamedTuple):
    """The three outputs as float32 rows [count, width]."""

    keys: Floats
    values: Floats
    output: Floats


class Layer:
    """A session of one layer, and buffers for each of its groups."""

    def __init__(
        self, path: Path, engine: str, threads: int | None, hidden_type: str, session: Session | None = None
    ) -> None:
        """`session`: an open session of that file. Raises BadInput if the engine cannot load it or it is no layer."""
        self.session = open_session(path, engine, threads) if session is None else session
        names = {info.name for group in self.session.groups for info in (*group.inputs, *group.outputs)}
        self.caches = names != PLAIN  # otherwise it keeps nothing between tokens
        if self.caches and not names >= {*OUTPUTS, *INPUTS}:
            raise BadInput(f"{path.name} has no {', '.join(sorted({*OUTPUTS, *INPUTS} - names))}: it is not a layer")
        self.hidden_type, self.dtype = hidden_type, FLOATS[hidden_type]
        self._bound: dict[tuple[int, int, int], tuple[dict[str, Array], Any]] = {}

    def run(
        self,
        index: int,
        start: int,
        hidden: Floats,
        keys: Floats,
        values: Floats,
        shift: int = 0,
        seen: Floats | None = None,
        shape: tuple[int, int] | None = None,
    ) -> Result:
        """Runs group `index` on hidden states [count, H] after K and V rows [start, D].

        `shift` is added to the positions, and `seen` [count, start + count] replaces the causal mask, to reproduce
        errors of a runner. `shape`: tokens and history, if different from the group (flexible engines only). Values
        that are not finite are returned. Raises BadInput if the engine refuses to run.
        """
        tokens, history = shape or (self.session.groups[index].tokens, self.session.groups[index].history)
        arrays, binding = self._buffers(index, tokens, history)
        count = len(hidden)
        arrays["input"][...] = 0
        arrays["input"][0, :count] = from_float32(hidden, self.dtype)
        if not self.caches:
            with contextlib.suppress(NotFinite):
                binding.run()
            none = np.zeros((count, 0), np.float32)
            return Result(none, none, to_float32(arrays["output"][0, :count], self.dtype).copy())
        arrays["indices"][...] = 0
        arrays["indices"][0, :count] = np.maximum(np.arange(start, start + count) + shift, 0)
        seen = causal(start, count) if seen is None else seen
        mask = _mask(tokens, history, within(seen, self.session.window), self.dtype)
        arrays["mask"][0] = from_float32(mask, self.dtype)
        if history:
            for name, rows in (("K_cache", keys), ("V_cache", values)):
                arrays[name][...] = 0
                arrays[name][0, :start] = from_float32(rows, self.dtype)
        with contextlib.suppress(NotFinite):  # visible in the rows
            binding.run()
        return Result(*(to_float32(arrays[name][0, :count], self.dtype).copy() for name in OUTPUTS))

    def _buffers(self, index: int, tokens: int, history: int) -> tuple[dict[str, Array], Any]:
        key = (index, tokens, history)
        if key not in self._bound:
            group = self.session.groups[index]
            infos = [info for info in (*group.inputs, *group.outputs) if history or info.name not in CACHES]
            arrays = {
                info.name: self.session.allocate(dataclasses.replace(info, shape=_shape(info, tokens, history)))
                for info in infos
            }
            self._bound[key] = arrays, self.session.bind(index, arrays)
        return self._bound[key]


def _shape(info: TensorInfo, tokens: int, history: int) -> tuple[int, ...]:
    """The shape of a tensor for the given tokens and history."""
    if info.name == "mask":
        return 1, tokens, history + tokens
    return (1, history if info.name in CACHES else tokens, *(int(size) for size in info.shape[2:]))


def causal(start: int, count: int) -> Floats:
    """A causal mask [count, start + count]: 0 for visible rows, BLOCKED for masked ones."""
    rows, columns = np.arange(count)[:, None] + start, np.arange(start + count)[None, :]
    return np.where(columns <= rows, 0.0, BLOCKED).astype(np.float32)


def within(seen: Floats, window: int) -> Floats:
    """Restricts a mask [count, start + count] to the last `window` tokens; 0: unlimited."""
    if not window:
        return seen
    count, whole = seen.shape
    distance = np.arange(whole - count, whole)[:, None] - np.arange(whole)[None, :]
    return np.where(distance >= window, np.float32(BLOCKED), seen)


def _mask(tokens: int, history: int, seen: Floats, dtype: str) -> Floats:
    """Expands a mask to the shape [tokens, history + tokens] of a group; padding attends only to itself."""
    lowest = max(BLOCKED, -65504.0) if dtype == "FLOAT16" else BLOCKED
    whole = np.full((tokens, history + tokens), lowest, np.float32)
    np.fill_diagonal(whole[:, history:], 0.0)
    count = len(seen)
    start = seen.shape[1] - count
    whole[:count, :start] = np.maximum(seen[:, :start], lowest)
    whole[:count, history : history + count] = np.maximum(seen[:, start:], lowest)
    return whole

"""One layer's axmodel by its C interface: with positions, a mask and a history of its own, and no code of the runner.

What the runner gets wrong about masks and caches does not show here; what the axmodel or the engine gets wrong does.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from board.axmodel import BLOCKED
from board.dtypes import FLOATS, from_float32, to_float32
from board.errors import BadInput, NotFinite
from board.session import Array, SessionGroup, open_session

Floats = NDArray[np.float32]

OUTPUTS = ("K_cache_out", "V_cache_out", "output")
INPUTS = ("indices", "input", "mask")


class Result(NamedTuple):
    """float32 rows [count, width] of the three outputs."""

    keys: Floats
    values: Floats
    output: Floats


class Layer:
    """A session of one layer, and buffers for each of its groups."""

    def __init__(self, path: Path, engine: str, threads: int | None, hidden_type: str) -> None:
        """Raises BadInput when the engine does not load the file, or the file is no layer's."""
        self.session = open_session(path, engine, threads)
        names = {info.name for group in self.session.groups for info in (*group.inputs, *group.outputs)}
        if not names >= {*OUTPUTS, *INPUTS}:
            raise BadInput(f"{path.name} has no {', '.join(sorted({*OUTPUTS, *INPUTS} - names))}: it is no layer's")
        self.dtype = FLOATS[hidden_type]
        self._bound: dict[int, tuple[dict[str, Array], Any]] = {}

    def run(
        self,
        index: int,
        start: int,
        hidden: Floats,
        keys: Floats,
        values: Floats,
        shift: int = 0,
        seen: Floats | None = None,
    ) -> Result:
        """What group `index` makes of hidden states [count, H] behind K and V rows [start, D].

        `shift` is added to the positions; `seen` [count, start + count] stands in for the causal mask: what a runner
        that is wrong would give.
        What is not finite is returned as it is. Raises BadInput when the engine refuses to run.
        """
        arrays, binding = self._buffers(index)
        group, count = self.session.groups[index], len(hidden)
        arrays["input"][...] = 0
        arrays["input"][0, :count] = from_float32(hidden, self.dtype)
        arrays["indices"][...] = 0
        arrays["indices"][0, :count] = np.maximum(np.arange(start, start + count) + shift, 0)
        arrays["mask"][0] = from_float32(
            _mask(group, causal(start, count) if seen is None else seen, self.dtype), self.dtype
        )
        if group.history:
            for name, rows in (("K_cache", keys), ("V_cache", values)):
                arrays[name][...] = 0
                arrays[name][0, :start] = from_float32(rows, self.dtype)
        with contextlib.suppress(NotFinite):  # the rows tell
            binding.run()
        return Result(*(to_float32(arrays[name][0, :count], self.dtype).copy() for name in OUTPUTS))

    def _buffers(self, index: int) -> tuple[dict[str, Array], Any]:
        if index not in self._bound:
            group = self.session.groups[index]
            arrays = {info.name: self.session.allocate(info) for info in (*group.inputs, *group.outputs)}
            self._bound[index] = arrays, self.session.bind(index, arrays)
        return self._bound[index]


def causal(start: int, count: int) -> Floats:
    """[count, start + count]: 0 where a token sees a row, BLOCKED where it must not."""
    rows, columns = np.arange(count)[:, None] + start, np.arange(start + count)[None, :]
    return np.where(columns <= rows, 0.0, BLOCKED).astype(np.float32)


def _mask(group: SessionGroup, seen: Floats, dtype: str) -> Floats:
    """The mask [tokens, history + tokens] of a group, from that of its tokens; padding sees itself only."""
    lowest = max(BLOCKED, -65504.0) if dtype == "FLOAT16" else BLOCKED
    tokens, history = group.tokens, group.history
    whole = np.full((tokens, history + tokens), lowest, np.float32)
    np.fill_diagonal(whole[:, history:], 0.0)
    count = len(seen)
    start = seen.shape[1] - count
    whole[:count, :start] = np.maximum(seen[:, :start], lowest)
    whole[:count, history : history + count] = np.maximum(seen[:, start:], lowest)
    return whole

"""One layer's axmodel by its C interface: with positions, a mask and a history of its own, and no code of the runner.

What the runner gets wrong about masks and caches does not show here; what the axmodel or the engine gets wrong does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from board.axmodel import BLOCKED
from board.dtypes import FLOATS, from_float32, to_float32
from board.errors import NotFinite
from board.session import Array, SessionGroup, open_session
from toolchain.doctor.stored import Floats

OUTPUTS = ("K_cache_out", "V_cache_out", "output")
DECODES = 12  # single tokens that are asked for, at most


class Visit(NamedTuple):
    """`tokens` tokens at `start`, in a shape group; `probe` is the index of a probe behind the walk, -1 in the walk."""

    stage: str
    group: int
    start: int
    tokens: int
    probe: int = -1

    @property
    def text(self) -> str:
        if self.stage == "decode":
            return f"decode at position {self.start}"
        return f"{self.stage}" if not self.start else f"{self.stage} behind {self.start} rows"


class Result(NamedTuple):
    """float32 rows [count, width] of the three outputs."""

    keys: Floats
    values: Floats
    output: Floats

    @property
    def finite(self) -> tuple[bool, bool, bool]:
        keys, values, output = (bool(np.isfinite(rows).all()) for rows in self)
        return keys, values, output


class Layer:
    """A session of one layer, and buffers for each of its groups."""

    def __init__(self, path: Path, engine: str, hidden_type: str) -> None:
        """Raises BadInput when the engine does not load the file."""
        self.session = open_session(path, engine)
        self.dtype = FLOATS[hidden_type]
        self._bound: dict[int, tuple[dict[str, Array], Any]] = {}

    def run(
        self, visit: Visit, hidden: Floats, keys: Floats, values: Floats, shift: int = 0, mask: Floats | None = None
    ) -> Result:
        """The outputs for hidden states [count, H] behind `keys` and `values` [start, kv_size].

        `shift` is added to the positions. `mask` [count, start + count] stands in for the causal one.
        """
        arrays, binding = self._buffers(visit.group)
        group = self.session.groups[visit.group]
        start, count = visit.start, visit.tokens
        arrays["input"][...] = 0
        arrays["input"][0, :count] = from_float32(hidden, self.dtype)
        arrays["indices"][...] = 0
        arrays["indices"][0, :count] = np.maximum(np.arange(start, start + count) + shift, 0)
        arrays["mask"][0] = from_float32(_mask(group, start, count, mask, self.dtype), self.dtype)
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


def _mask(group: SessionGroup, start: int, count: int, seen: Floats | None, dtype: str) -> Floats:
    """The mask [tokens, history + tokens] of a group: padding sees itself only."""
    lowest = max(BLOCKED, -65504.0) if dtype == "FLOAT16" else BLOCKED
    tokens, history = group.tokens, group.history
    whole = np.full((tokens, history + tokens), lowest, np.float32)
    np.fill_diagonal(whole[:, history:], 0.0)
    given = np.maximum(causal(start, count) if seen is None else seen, lowest)
    whole[:count, :start] = given[:, :start]
    whole[:count, history : history + count] = given[:, start:]
    return whole


def visits(groups: Sequence[SessionGroup], context: int, count: int, probes: Sequence[Any]) -> Iterator[Visit]:
    """What a layer is asked: every group at a full history and at an odd one, and single tokens at their borders."""
    prefills = [group for group in groups if group.tokens > 1]
    decode = next((group for group in groups if group.tokens == 1), None)
    for group in prefills:
        longest = min(group.history, context - 1)
        starts = {0} if not group.history else {longest, longest // 2 | 1}
        for start in sorted(start for start in starts if start < count and start <= group.history):
            stage = "history" if group.history else "prefill"
            yield Visit(stage, group.index, start, min(group.tokens, count - start))
    if decode is not None:
        borders = {0, 1, count // 2, count - 1}
        for group in prefills:
            borders |= {group.history - 1, group.history, group.history + 1, group.history + group.tokens}
        inside = sorted(at for at in borders if 0 <= at < min(count, decode.history))
        if len(inside) > DECODES:
            inside = [inside[at] for at in np.linspace(0, len(inside) - 1, DECODES).astype(int)]
        yield from (Visit("decode", decode.index, at, 1) for at in inside)
    for index, probe in enumerate(probes):
        yield from _probe(prefills, decode, index, probe.step.start, probe.step.stop)


def _probe(
    prefills: Sequence[SessionGroup], decode: SessionGroup | None, index: int, start: int, stop: int
) -> Iterator[Visit]:
    """The first token of a probe in decode, and all of it in the prefill group with the least history that holds it."""
    fitting = [group for group in prefills if group.history >= start and group.tokens >= stop - start]
    if fitting:
        group = min(fitting, key=lambda group: group.history)
        yield Visit("far", group.index, start, stop - start, index)
    if decode is not None and start <= decode.history:
        yield Visit("decode", decode.index, start, 1, index)

"""The test inputs of a layer: every shape group, after full and odd histories, up to the end of the context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from axrun.session import SessionGroup

DECODES = 12  # maximum number of decode visits


class Visit(NamedTuple):
    """A run of `tokens` tokens at `start` in a shape group; `probe` is an index of a probe, -1 for the walk itself."""

    stage: str
    group: int
    start: int
    tokens: int
    probe: int = -1

    @property
    def text(self) -> str:
        if self.stage == "decode":
            return f"decode at position {self.start}"
        return f"{self.stage}" if not self.start else f"{self.stage} after {self.start} rows"


def visits(groups: Sequence[SessionGroup], context: int, count: int, probes: Sequence[Any]) -> Iterator[Visit]:
    """Visits of every group after a full and an odd history, and of single tokens at the groups' boundaries."""
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
    """The first token of a probe as decode, and the whole probe in the smallest prefill group that fits."""
    fitting = [group for group in prefills if group.history >= start and group.tokens >= stop - start]
    if fitting:
        group = min(fitting, key=lambda group: group.history)
        yield Visit("far", group.index, start, stop - start, index)
    if decode is not None and start <= decode.history:
        yield Visit("decode", decode.index, start, 1, index)

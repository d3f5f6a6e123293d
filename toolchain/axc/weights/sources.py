"""The kinds of weight sources. They compose: all but `Stored` wrap other sources.

Without arithmetic, rows keep their stored type, so a bfloat16 weight stays bfloat16. Arithmetic is done in float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from axc.stored import widen
from axc.weights import Shape, Source, Tensors
from axrun.errors import BadInput


@dataclass(frozen=True)
class Stored:
    """An unchanged tensor of the checkpoint."""

    name: str
    shape: Shape

    @property
    def reads(self) -> Mapping[str, Shape]:
        return {self.name: self.shape}

    def dtype(self, tensors: Tensors) -> str:
        return tensors.dtype(self.name)

    def rows(self, tensors: Tensors, start: int, stop: int) -> NDArray[Any]:
        return tensors.finite_rows(self.name, start, stop)


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of another source: one of several projections stored as one matrix."""

    source: Source
    start: int
    stop: int

    @property
    def shape(self) -> Shape:
        return (self.stop - self.start, *self.source.shape[1:])

    @property
    def reads(self) -> Mapping[str, Shape]:
        return self.source.reads

    def dtype(self, tensors: Tensors) -> str:
        return self.source.dtype(tensors)

    def rows(self, tensors: Tensors, start: int, stop: int) -> NDArray[Any]:
        return self.source.rows(tensors, self.start + start, self.start + stop)


@dataclass(frozen=True)
class Stacked:
    """The concatenated rows of several sources: projections stored separately but computed together."""

    sources: tuple[Source, ...]

    @property
    def shape(self) -> Shape:
        return (sum(source.shape[0] for source in self.sources), *self.sources[0].shape[1:])

    @property
    def reads(self) -> Mapping[str, Shape]:
        return {name: shape for source in self.sources for name, shape in source.reads.items()}

    def dtype(self, tensors: Tensors) -> str:
        """The common type of the sources; float32 if they differ."""
        found = {source.dtype(tensors) for source in self.sources}
        return found.pop() if len(found) == 1 else "FLOAT"

    def rows(self, tensors: Tensors, start: int, stop: int) -> NDArray[Any]:
        dtype = self.dtype(tensors)
        parts, first = [], 0
        for source in self.sources:
            begin, end = max(start - first, 0), min(stop - first, source.shape[0])
            if begin < end:
                rows = source.rows(tensors, begin, end)
                parts.append(rows if source.dtype(tensors) == dtype else _widened(source, tensors, rows))
            first += source.shape[0]
        return np.concatenate(parts)


@dataclass(frozen=True, eq=False)
class Gathered:
    """Row i is row `index[i]` of another source: for reordered heads or halves of heads, or a selection of rows."""

    source: Source
    index: NDArray[np.int64] = field(repr=False)

    @property
    def shape(self) -> Shape:
        return (len(self.index), *self.source.shape[1:])

    @property
    def reads(self) -> Mapping[str, Shape]:
        return self.source.reads

    def dtype(self, tensors: Tensors) -> str:
        return self.source.dtype(tensors)

    def rows(self, tensors: Tensors, start: int, stop: int) -> NDArray[Any]:
        """Reads one range of rows if the index is dense enough, else each run of consecutive rows."""
        wanted = self.index[start:stop]
        low, high = int(wanted.min()), int(wanted.max()) + 1
        if high - low <= 4 * len(wanted):
            return np.asarray(self.source.rows(tensors, low, high)[wanted - low])
        return np.concatenate([self.source.rows(tensors, first, last) for first, last in _runs(wanted)])


@dataclass(frozen=True, eq=False)
class Columns:
    """Column i is column `index[i]` of another source, a matrix."""

    source: Source
    index: NDArray[np.int64] = field(repr=False)

    @property
    def shape(self) -> Shape:
        return (self.source.shape[0], len(self.index))

    @property
    def reads(self) -> Mapping[str, Shape]:
        return self.source.reads

    def dtype(self, tensors: Tensors) -> str:
        return self.source.dtype(tensors)

    def rows(self, tensors: Tensors, start: int, stop: int) -> NDArray[Any]:
        return np.ascontiguousarray(self.source.rows(tensors, start, stop)[:, self.index])


@dataclass(frozen=True)
class Affine:
    """factor * weight + offset in float32: a multiplier of the model, or the 1 + of a norm."""

    source: Source
    factor: float = 1.0
    offset: float = 0.0

    @property
    def shape(self) -> Shape:
        return self.source.shape

    @property
    def reads(self) -> Mapping[str, Shape]:
        return self.source.reads

    def dtype(self, tensors: Tensors) -> str:
        return "FLOAT"

    def rows(self, tensors: Tensors, start: int, stop: int) -> NDArray[np.float32]:
        rows = _widened(self.source, tensors, self.source.rows(tensors, start, stop))
        return np.asarray(rows * np.float32(self.factor) + np.float32(self.offset), np.float32)


def scaled(source: Source, factor: float) -> Source:
    """The source times `factor`; the source itself if that is 1."""
    return source if factor == 1 else Affine(source, factor=factor)


def one_plus(source: Source) -> Source:
    """1 + weight, as in Gemma's norms."""
    return Affine(source, offset=1.0)


def run_of_rows(source: Source) -> tuple[str, int] | None:
    """The tensor of which a weight is a run of rows as stored, and the first of them; None for other sources."""
    if isinstance(source, Stored):
        return source.name, 0
    if isinstance(source, Rows) and (found := run_of_rows(source.source)):
        return found[0], found[1] + source.start
    return None


def split(source: Source, *sizes: int) -> tuple[Source, ...]:
    """Splits a source into parts of `sizes` rows. Raises ValueError if they do not add up."""
    if sum(sizes) != source.shape[0]:
        raise ValueError(f"{sizes} rows of {source.shape[0]}")
    starts = np.cumsum((0, *sizes)).tolist()
    return tuple(Rows(source, start, stop) for start, stop in itertools.pairwise(starts))


def _widened(source: Source, tensors: Tensors, rows: NDArray[Any]) -> NDArray[np.float32]:
    try:
        return widen(rows, source.dtype(tensors))
    except OverflowError as overflow:
        raise BadInput(f"{next(iter(source.reads))} holds {overflow}") from None


def _runs(index: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Runs [first, last) of consecutive numbers."""
    breaks = np.flatnonzero(np.diff(index) != 1) + 1
    for run in np.split(index, breaks):
        yield int(run[0]), int(run[-1]) + 1

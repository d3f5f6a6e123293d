"""Checks the bookkeeping of the runner's decoder with dummy layers that compute nothing.

Each layer is a `DummySession` that returns random rows and compares its inputs with a `Ledger`: an independent model of
the expected positions, masks, hidden states and cached rows. It is cheap enough to check every position and layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from axrun.decoder import Chunk
from axrun.format.axmodel import BLOCKED, TensorInfo
from axrun.format.dtypes import DTYPES, from_float32, to_float32
from axrun.session import CACHES, Array, SessionGroup, StackedBinding

WIDTH = 4  # values per row
CODES = 1 << 12  # distinct rows per kind and layer
SEED = 5
KINDS = ("K", "V", "hidden state")
WIDE = {*CACHES, "K_cache_out", "V_cache_out", "input", "output"}


class Fault(NamedTuple):
    """The first error of the runner: `part` is the layer and the tokens, `cause` the error, `file` the source file."""

    part: str
    expected: str
    seen: str
    cause: str
    file: str = "board/axrun/decoder.py"


class FaultFound(Exception):
    """Carries a Fault through the runner's code."""


class Seen(NamedTuple):
    """Copies of a layer's inputs: positions, mask [tokens, history + tokens] and hidden states."""

    indices: Array
    mask: Array
    hidden: Array


class Ledger:
    """The expected K and V rows of all layers by position.

    Every token has a unique number, which determines its rows in all layers.
    """

    def __init__(self, windows: Sequence[int], context: int, dtype: str) -> None:
        """`windows`: the attention window of each layer in tokens, including the token itself; 0: unlimited."""
        self.layers, self.dtype = len(windows), dtype
        layers, self._windows = self.layers, windows
        draw = np.random.default_rng(SEED)
        lowest = max(BLOCKED, -65504.0) if dtype == "FLOAT16" else BLOCKED
        self._values = from_float32(np.array([0.0, lowest], np.float32), dtype)  # values of a mask: visible, blocked
        self._given = from_float32(draw.standard_normal((CODES, WIDTH)).astype(np.float32), dtype)
        rows = draw.standard_normal((len(KINDS), layers, CODES, WIDTH)).astype(np.float32)
        self._codes = from_float32(rows, dtype)
        self.rows: Array = np.zeros((2, layers, context, WIDTH), self._codes.dtype)  # expected K and V in the cache
        self._before = self.rows.copy()  # the rows at these positions before a rollback
        self.position = 0  # position of the next token
        self._next = 0  # number of the next token
        self._seen: list[Seen] = []
        self._text = ""

    def take(self, start: int, count: int) -> Array:
        """Starts a step: returns hidden states [count, WIDTH] of new tokens from position `start` on."""
        if start < self.position:
            self._before[:, :, start : self.position] = self.rows[:, :, start : self.position]
            self._next += CODES // 2 + 1  # not the numbers of the tokens that were there
        self.position, self._seen = start, []
        return self._given[self._numbers(count)]

    def visit(self, layer: int, arrays: Mapping[str, Array]) -> None:
        """Run of a layer: checks its inputs and fills its outputs. Raises FaultFound."""
        tokens = arrays["input"].shape[1]
        self._text = f"layer {layer}, tokens from position {self.position} on"
        if layer != len(self._seen):
            raise _wrong(self._text, f"layer {len(self._seen)} next", f"layer {layer}", "layers run in the wrong order")
        mask = arrays["mask"][0]
        first = self._seen[0] if self._seen else None
        if first is not None and np.array_equal(mask, first.mask):
            mask = first.mask
        self._seen.append(Seen(arrays["indices"][0].copy(), mask if first else mask.copy(), arrays["input"][0].copy()))
        self._cached(layer, arrays)
        numbers = self._numbers(tokens)
        for kind, name in enumerate(("K_cache_out", "V_cache_out", "output")):
            arrays[name][0] = self._codes[kind, layer, numbers]

    def chunk(self, chunk: Chunk, output: Array) -> None:
        """Checks a chunk after it ran through all layers and returned `output`. Raises FaultFound."""
        at, count = self.position, chunk.count
        tokens = f"tokens {at} to {at + count - 1}" if count > 1 else f"token {at}"
        if len(self._seen) != self.layers:
            raise _wrong(tokens, f"{self.layers} layers", f"{len(self._seen)}", "it does not run each layer once")
        if chunk.position != at:
            raise _wrong(tokens, f"position {at}", f"{chunk.position}", "chunks are not consecutive")
        numbers = self._numbers(count)
        for layer, given in enumerate(self._seen):
            part = f"layer {layer}, {tokens}"
            self._positions(part, given.indices, at, count)
            window = self._windows[layer]
            if not layer or given.mask is not self._seen[0].mask or window != self._windows[0]:
                self._masked(part, given.mask, at, count, window)
            wanted = self._given[numbers] if not layer else self._codes[2, layer - 1, numbers]
            self._hidden(part, given.hidden, wanted, count)
        self._hidden(f"{tokens}, output", output, self._codes[2, -1, numbers], count)
        self.rows[:, :, at : at + count] = self._codes[:2, :, numbers]
        self.position, self._next, self._seen = at + count, self._next + count, []

    def last(self) -> Array:
        """The output [WIDTH] of the last layer for the token before `position`."""
        return np.asarray(self._codes[2, -1, (self._next - 1) % CODES])

    def kept(self, caches: Sequence[Sequence[Array]]) -> None:
        """Compares the written K and V rows of all layers' caches. Raises FaultFound."""
        for layer in range(self.layers):
            self._text = f"layer {layer}, after {self.position} tokens"
            for kind in (0, 1):
                self._rows(kind, layer, caches[kind][layer][0])
                if not np.isfinite(to_float32(caches[kind][layer][0, self.position :], self.dtype)).all():
                    cause = "rows after the end of the cache are not finite: a mask does not hide those"
                    raise _wrong(self._text, "finite rows", "non-finite rows", cause)

    def _numbers(self, count: int) -> Array:
        return (self._next + np.arange(count)) % CODES

    def _cached(self, layer: int, arrays: Mapping[str, Array]) -> None:
        tokens, columns = arrays["mask"].shape[1:]
        history = arrays[CACHES[0]].shape[1] if CACHES[0] in arrays else 0
        if columns != history + tokens or arrays["indices"].shape[1] != tokens:
            seen = f"{columns} columns for {history} + {tokens}"
            raise _wrong(self._text, "a mask with history + tokens columns", seen, "shapes do not fit")
        if self.position > history:
            cause = f"its group has a history of only {history} rows: the chunk uses the wrong group"
            raise _wrong(self._text, f"{self.position} cached rows", f"{history}", cause)
        for kind, name in enumerate(CACHES):
            if name in arrays:
                self._rows(kind, layer, arrays[name][0])

    def _rows(self, kind: int, layer: int, seen: Array) -> None:
        end = self.position
        wanted = self.rows[kind, layer, :end]
        if np.array_equal(seen[:end], wanted):
            return
        bad = np.flatnonzero((seen[:end] != wanted).any(axis=1))
        row = int(bad[0])
        cause = self._holds(kind, layer, row, seen)
        part = f"{self._text}: {KINDS[kind]} row {row} in the cache"
        raise _wrong(
            part, f"the row that layer {layer} returned for position {row}", f"another; {len(bad)} rows differ", cause
        )

    def _holds(self, kind: int, layer: int, row: int, seen: Array) -> str:
        """Describes what a row of the cache holds instead of the expected row."""
        found = seen[row]
        if found.any() and np.array_equal(found, self._before[kind, layer, row]):
            return "it holds the row from before a rollback: a stale row was kept, or the new one was not written"
        if not found.any():
            elsewhere = np.flatnonzero((seen == self.rows[kind, layer, row]).all(axis=1))
            if len(elsewhere):
                return f"{KINDS[kind]} row {row} was written to row {elsewhere[0]}: rows are in the wrong place"
            return "the row was not written, or was cleared"
        for other, at, place in np.argwhere((self.rows == found).all(axis=-1)):
            return f"it holds {KINDS[other]} row {place} of layer {at}: rows are in the wrong place"
        return "it holds values that no layer returned for a cached token"

    def _positions(self, part: str, indices: Array, at: int, count: int) -> None:
        wanted = np.arange(at, at + count)
        if not np.array_equal(indices[:count], wanted):
            first = int(np.flatnonzero(indices[:count] != wanted)[0])
            apart = int(indices[first]) - int(wanted[first])
            cause = f"positions are off by {apart:+d}, from token {at + first} on"
            raise _wrong(part, f"position {wanted[first]}", f"{indices[first]}", cause)

    def _masked(self, part: str, mask: Array, at: int, count: int, window: int) -> None:
        tokens = len(mask)
        history = mask.shape[1] - tokens
        rows, columns = np.arange(count)[:, None], np.arange(history + tokens)
        visible = (columns < at) | ((columns >= history) & (columns - history <= rows))
        if window:
            positions = np.where(columns < history, columns, at + columns - history)
            visible &= at + rows - positions < window
        wanted = np.where(visible, *self._values)
        if not np.array_equal(mask[:count], wanted):
            row, column = (int(number) for number in np.argwhere(mask[:count] != wanted[:count])[0])
            seen, right = (float(to_float32(each[row, column : column + 1], self.dtype)[0]) for each in (mask, wanted))
            raise _wrong(
                part, f"{right:g} in its mask", f"{seen:g}", _mask_words(at, count, history, row, column, seen)
            )
        if not (mask[count:] == self._values[0]).any(axis=1).all():
            cause = "a row of padding is fully masked: its softmax is not finite"
            raise _wrong(part, "padding attends to itself", "fully masked", cause)

    def _hidden(self, part: str, seen: Array, wanted: Array, count: int) -> None:
        if len(seen) < count or not np.array_equal(seen[:count], wanted):
            bad = np.flatnonzero((seen[:count] != wanted[: len(seen)]).any(axis=1)) if len(seen) >= count else [0]
            cause = "a layer does not get the output of the previous one, or in another order"
            raise _wrong(part, f"the hidden state of token {self.position + int(bad[0])}", "a different one", cause)
        if not np.isfinite(to_float32(seen, self.dtype)).all():
            raise _wrong(part, "finite hidden states in padding", "non-finite ones", "padding is not cleared")


class DummySession:
    """A session of one layer that returns rows of the ledger, with the same shapes and flexibility as the engine's."""

    stacks = False

    def __init__(
        self, groups: tuple[SessionGroup, ...], flexible: bool, window: int, layer: int, ledger: Ledger
    ) -> None:
        self.groups, self.flexible, self.exact, self.window = groups, flexible, True, window
        self._layer, self._ledger = layer, ledger

    def allocate(self, info: TensorInfo) -> Array:
        return np.zeros([int(size) for size in info.shape], DTYPES[info.dtype].numpy)

    def bind(self, group: int, arrays: Mapping[str, Array]) -> _Bound:
        return _Bound(self._layer, self._ledger, dict(arrays))

    def bind_stacked(self, arrays: Mapping[str, Array]) -> StackedBinding:
        raise ValueError("a dummy session does not stack rows")


class _Bound:
    def __init__(self, layer: int, ledger: Ledger, arrays: Mapping[str, Array]) -> None:
        self._layer, self._ledger, self._arrays = layer, ledger, arrays

    def run(self) -> None:
        self._ledger.visit(self._layer, self._arrays)


def narrow(groups: Sequence[SessionGroup]) -> tuple[SessionGroup, ...]:
    """The groups with rows of WIDTH values."""

    def thin(info: TensorInfo) -> TensorInfo:
        return dataclasses.replace(info, shape=(*info.shape[:2], WIDTH)) if info.name in WIDE else info

    return tuple(
        dataclasses.replace(group, inputs=tuple(map(thin, group.inputs)), outputs=tuple(map(thin, group.outputs)))
        for group in groups
    )


def _mask_words(at: int, count: int, history: int, row: int, column: int, value: float) -> str:
    token = at + row
    new = column - history
    if column < history:
        what = f"cached row {column}" if column < at else f"row {column}, after the {at} cached ones"
    elif new < count:
        what = "itself" if new == row else f"the token at position {at + new}"
    else:
        what = "a row of padding"
    if value == 0.0:
        return f"its mask lets the token at position {token} see {what}"
    return f"its mask hides {what} from the token at position {token}"


def _wrong(part: str, expected: str, seen: str, cause: str) -> FaultFound:
    return FaultFound(Fault(part, expected, seen, cause))


__all__ = ["WIDTH", "DummySession", "Fault", "FaultFound", "Ledger", "narrow"]

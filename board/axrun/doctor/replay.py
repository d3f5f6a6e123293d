"""Compares the runner's decoder with a layer called directly, in the same chunks and shapes.

Both run the same axmodel in the same engine, so rounding and summation order are equal: with our engines, the rows are
bit-identical for all types. Any difference is an error of the runner: its masks, positions, or cached rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from axrun.agreement import LEAST_UPDATE, ROUNDING, SMALLEST
from axrun.decoder import Chunk, Decoder
from axrun.doctor.direct import Floats, Layer, Result
from axrun.doctor.known_faults import known_faults
from axrun.doctor.row_errors import KEYS, OUTPUT, VALUES
from axrun.errors import CheckFailed
from axrun.format.dtypes import to_float32

# Minimum number of tokens to cache and roll back before the sequence; with prefill groups, two prefills.
ROLLED_BACK = 3
VENDORS = 5e-3  # tolerance relative to the update, for engines that are not deterministic; estimated
ALIKE = 0.98  # minimum cosine of rows considered equal
EXPLAINED = 0.5  # a known fault is the cause if it reduces the difference below this factor

Rows = tuple[Floats, Floats]


class Difference(NamedTuple):
    """The first row that differs between runner and layer: in the step [start, stop), at `position`."""

    start: int
    stop: int
    what: str
    position: int
    expected: str
    seen: str
    cause: str

    @property
    def place(self) -> str:
        """A description of the place."""
        tokens = f"tokens {self.start} to {self.stop - 1}" if self.stop - self.start > 1 else f"token {self.start}"
        if self.what == OUTPUT:
            return f"{tokens}, output at position {self.position}"
        return f"{tokens}, {self.what} {self.position} in the cache"


def difference(
    decoder: Decoder, layer: Layer, hidden: Floats, steps: Iterable[tuple[int, int]], exact: bool = True
) -> tuple[Floats, Difference | None]:
    """Runs a single-layer decoder over steps (start, stop) of hidden states [n, H], and compares each step.

    Before that, other tokens are cached and rolled back. `exact`: the engine is deterministic for equal shapes.
    Returns the outputs of the decoder [n, H] up to the first difference, and that difference or None.
    """
    other = hidden[::-1]
    decoder.cache.reset()
    most = max(group.tokens for group in decoder.groups)
    count = min(max(2 * most if most > 1 else 0, ROLLED_BACK), len(hidden))
    made = Result(*(np.zeros((len(hidden), width), np.float32) for width in (decoder.kv_size,) * 2 + hidden.shape[1:]))
    outputs, start, stop = np.zeros_like(hidden), 0, count
    try:
        decoder.forward(other[:count], 0)
        for start, stop in steps:
            given = hidden[start:stop] if start == decoder.cache.length or not start else other[start:stop]
            stale = kept(decoder)
            out = decoder.forward(given, start)
            outputs[start:stop] = out
            found = _step(decoder, layer, given, start, made, out, stale, exact)
            if found is not None:
                return outputs, found
    except CheckFailed as failed:
        seen = str(failed).partition("\n")[0]
        cause = "it returns values that are not finite"
        return outputs, Difference(start, stop, OUTPUT, start, "finite values", seen, cause)
    return outputs, None


def kept(decoder: Decoder) -> Rows:
    """The K and V rows in the cache of a single-layer decoder."""
    keys, values = (rows[0][0] for rows in (decoder.cache.keys, decoder.cache.values))
    return to_float32(keys, decoder.dtype).copy(), to_float32(values, decoder.dtype).copy()


def _step(
    decoder: Decoder, layer: Layer, given: Floats, start: int, made: Result, out: Floats, stale: Rows, exact: bool
) -> Difference | None:
    """Compares one step; adds the rows that the layer returns by itself to `made`."""
    stop, hidden_type = start + len(given), layer.hidden_type
    for chunk in decoder.chunks(start, len(given)):
        rows = slice(chunk.position - start, chunk.position - start + chunk.count)
        right = _direct(decoder, layer, chunk, given[rows], made)
        for whole, part in zip(made, right):
            whole[chunk.position : chunk.position + chunk.count] = part
        apart = _apart(out[rows], right.output, given[rows], hidden_type, exact)
        bad = np.flatnonzero(apart)
        if len(bad):
            at = chunk.position + int(bad[0])
            seen = f"a difference of {apart.max():.2g} of the layer's update in {len(bad)} of {chunk.count} rows"
            cause = _matching_fault(decoder, layer, chunk, given[rows], made, out[rows], right.output)
            return Difference(start, stop, OUTPUT, at, "the output of the layer called directly", seen, cause)
    for what, seen_rows, old, right_rows in zip((KEYS, VALUES), kept(decoder), stale, made[:2]):
        right_rows = right_rows[:stop]
        apart = _apart(seen_rows[:stop], right_rows, np.zeros_like(right_rows), hidden_type, exact)
        bad = np.flatnonzero(apart)
        if len(bad):
            row = int(bad[0])
            wanted = "the row unchanged" if row < start else "the row that the layer returns when called directly"
            text = f"a difference of {apart[row]:.2g}; {len(bad)} of {stop} rows differ"
            cause = _misplaced(what, row, kept(decoder), made, old, stop)
            return Difference(start, stop, what, row, wanted, text, cause)
    return None


def _direct(
    decoder: Decoder, layer: Layer, chunk: Chunk, given: Floats, made: Result, shift: int = 0, seen: Any = None
) -> Result:
    """Runs a chunk on the layer directly, in the shape that the runner uses."""
    before = chunk.position
    shape = decoder.shape(chunk)
    return layer.run(chunk.group, before, given, made.keys[:before], made.values[:before], shift, seen, shape)


@np.errstate(all="ignore")
def _apart(seen: Floats, wanted: Floats, given: Floats, hidden_type: str, exact: bool) -> NDArray[np.float64]:
    """The difference [n] of rows [n, H], relative to the update of `given`; 0 for equal rows."""
    apart = np.abs(seen.astype(np.float64) - wanted)
    if not exact:  # ignore flips of the last bit and effects of summation order
        apart = np.maximum(apart - 2.01 * ROUNDING[hidden_type] * np.abs(wanted) - 2 * SMALLEST[hidden_type], 0)
    update = np.linalg.norm(wanted.astype(np.float64) - given, axis=1)
    size = np.maximum(update, LEAST_UPDATE * np.linalg.norm(wanted, axis=1))
    error = np.linalg.norm(apart, axis=1) / np.maximum(size, 1e-30)
    error = np.where(np.isfinite(error), error, np.inf)
    return np.asarray(np.where(error > (0 if exact else VENDORS), error, 0))


def _matching_fault(
    decoder: Decoder, layer: Layer, chunk: Chunk, given: Floats, made: Result, out: Floats, right: Floats
) -> str:
    """Finds the known fault of mask or positions with which the layer reproduces the runner's output."""
    best, least = "", float(np.linalg.norm(right - out)) * EXPLAINED
    for fault in known_faults(chunk.position, chunk.count):
        tried = _direct(decoder, layer, chunk, given, made, fault.shift, fault.mask).output
        error = float(np.linalg.norm(tried - out))
        if error < least:
            best, least = fault.text, error
    return best or "probably its mask, its positions, or its cached rows"


def _misplaced(what: str, row: int, seen: Rows, made: Result, old: Floats, stop: int) -> str:
    """Describes what a row of the cache holds instead."""
    rows = seen[0 if what == KEYS else 1]
    if rows[row].any() and np.array_equal(rows[row], old[row]):
        return "the row still holds the values from before a rollback: it was not overwritten"
    wanted = (made.keys if what == KEYS else made.values)[row]
    if not rows[row].any():
        best = _alike(rows, wanted)
        if best is not None:
            return f"{what} {row} is in row {best}: rows are written to the wrong place"
        return f"{what} {row} was not written, or was cleared"
    for called, others in ((KEYS, made.keys[:stop]), (VALUES, made.values[:stop])):
        best = _alike(others, rows[row])
        if best is not None and (called, best) != (what, row):
            return f"the row holds {called} {best}: rows are written to or kept in the wrong place"
    return "probably rows are overwritten, or left from another sequence"


def _alike(rows: Floats, wanted: Floats) -> int | None:
    """The index of the row with the same direction, or None."""
    scores = rows @ wanted / (np.linalg.norm(rows, axis=1) * np.linalg.norm(wanted) + 1e-30)
    best = int(np.argmax(scores))
    return best if scores[best] > ALIKE else None

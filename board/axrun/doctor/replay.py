"""The runner's decoder beside a layer that is asked directly, in the same chunks and shapes.

Both run one axmodel in one engine on the same shapes, so that rounding and the order of sums are the same: where our
engines are asked, the rows are the same to the bit, whatever the types. What differs is the runner's own: its masks,
its positions, or the rows in its cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from axrun.agreement import LEAST_UPDATE, ROUNDING, SMALLEST
from axrun.decoder import Chunk, Decoder
from axrun.doctor.direct import Floats, Layer, Result
from axrun.doctor.measured import KEYS, OUTPUT, VALUES
from axrun.doctor.slips import slips
from axrun.errors import CheckFailed
from axrun.format.dtypes import to_float32

DISCARDED = 3  # tokens that are in the cache before a walk and are rolled back, and two prefills where there are any
VENDORS = 5e-3  # of a layer's update: what the order of sums may cost in an engine that promises nothing; a guess
ALIKE = 0.98  # cosine of rows that are one
EXPLAINED = 0.5  # of a difference: what a slip leaves of it at most, if it is the cause

Rows = tuple[Floats, Floats]


class Difference(NamedTuple):
    """The first row that the runner and the layer by itself do not share: of tokens [start, stop), at `position`."""

    start: int
    stop: int
    what: str
    position: int
    expected: str
    seen: str
    cause: str

    @property
    def place(self) -> str:
        """In words."""
        tokens = f"tokens {self.start} to {self.stop - 1}" if self.stop - self.start > 1 else f"token {self.start}"
        if self.what == OUTPUT:
            return f"{tokens}, output at position {self.position}"
        return f"{tokens}, {self.what} {self.position} in the cache"


def difference(
    decoder: Decoder, layer: Layer, hidden: Floats, steps: Iterable[tuple[int, int]], exact: bool = True
) -> tuple[Floats, Difference | None]:
    """Takes the decoder of a single layer over steps (start, stop) of hidden states [n, H], from 0 on.

    Other tokens stand in the cache before; a step that goes back is given other tokens than were there. `exact`: the
    engine gives the same bits for the same shapes. What the decoder gave [n, H] comes first, to the difference.
    """
    other = hidden[::-1]
    decoder.cache.reset()
    most = max(group.tokens for group in decoder.groups)
    count = min(max(2 * most if most > 1 else 0, DISCARDED), len(hidden))
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
        cause = "it gives values that are not finite"
        return outputs, Difference(start, stop, OUTPUT, start, "finite values", seen, cause)
    return outputs, None


def kept(decoder: Decoder) -> Rows:
    """K and V of all positions in the cache of a single layer."""
    keys, values = (rows[0][0] for rows in (decoder.cache.keys, decoder.cache.values))
    return to_float32(keys, decoder.dtype).copy(), to_float32(values, decoder.dtype).copy()


def _step(
    decoder: Decoder, layer: Layer, given: Floats, start: int, made: Result, out: Floats, stale: Rows, exact: bool
) -> Difference | None:
    """What differs in one step; what the layer gives by itself is added to `made`."""
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
            seen = f"they differ by {apart.max():.2g} of the layer's update; {len(bad)} of {chunk.count} rows do"
            cause = _slipped(decoder, layer, chunk, given[rows], made, out[rows], right.output)
            return Difference(start, stop, OUTPUT, at, "what the layer gives by itself", seen, cause)
    for what, seen_rows, old, right_rows in zip((KEYS, VALUES), kept(decoder), stale, made[:2]):
        right_rows = right_rows[:stop]
        apart = _apart(seen_rows[:stop], right_rows, np.zeros_like(right_rows), hidden_type, exact)
        bad = np.flatnonzero(apart)
        if len(bad):
            row = int(bad[0])
            wanted = "the row as it was before" if row < start else "the row that the layer gives by itself"
            text = f"it differs by {apart[row]:.2g}; {len(bad)} of {stop} rows do"
            cause = _misplaced(what, row, kept(decoder), made, old, stop)
            return Difference(start, stop, what, row, wanted, text, cause)
    return None


def _direct(
    decoder: Decoder, layer: Layer, chunk: Chunk, given: Floats, made: Result, shift: int = 0, seen: Any = None
) -> Result:
    """What the layer gives by itself for a chunk, in the shape that the runner has for it."""
    before = chunk.position
    shape = decoder.shape(chunk)
    return layer.run(chunk.group, before, given, made.keys[:before], made.values[:before], shift, seen, shape)


@np.errstate(all="ignore")
def _apart(seen: Floats, wanted: Floats, given: Floats, hidden_type: str, exact: bool) -> NDArray[np.float64]:
    """How far rows [n, H] lie apart, relative to what was added to `given`; 0 where they are the same. [n]"""
    apart = np.abs(seen.astype(np.float64) - wanted)
    if not exact:  # a flip of the last bit is none, nor is what the order of sums may do
        apart = np.maximum(apart - 2.01 * ROUNDING[hidden_type] * np.abs(wanted) - 2 * SMALLEST[hidden_type], 0)
    update = np.linalg.norm(wanted.astype(np.float64) - given, axis=1)
    size = np.maximum(update, LEAST_UPDATE * np.linalg.norm(wanted, axis=1))
    error = np.linalg.norm(apart, axis=1) / np.maximum(size, 1e-30)
    error = np.where(np.isfinite(error), error, np.inf)
    return np.asarray(np.where(error > (0 if exact else VENDORS), error, 0))


def _slipped(
    decoder: Decoder, layer: Layer, chunk: Chunk, given: Floats, made: Result, out: Floats, right: Floats
) -> str:
    """Which mask or which positions bring the layer to what the runner got."""
    best, least = "", float(np.linalg.norm(right - out)) * EXPLAINED
    for slip in slips(chunk.position, chunk.count):
        tried = _direct(decoder, layer, chunk, given, made, slip.shift, slip.mask).output
        error = float(np.linalg.norm(tried - out))
        if error < least:
            best, least = slip.text, error
    return best or "probably its mask, its positions, or the rows of history that it gives"


def _misplaced(what: str, row: int, seen: Rows, made: Result, old: Floats, stop: int) -> str:
    """What a row of the cache holds instead."""
    rows = seen[0 if what == KEYS else 1]
    if rows[row].any() and np.array_equal(rows[row], old[row]):
        return "the row still holds what was there before a rollback: stale rows are kept, new ones are not written"
    wanted = (made.keys if what == KEYS else made.values)[row]
    if not rows[row].any():
        best = _alike(rows, wanted)
        if best is not None:
            return f"{what} {row} lies in row {best}: rows are put in the wrong place"
        return f"{what} {row} was not written, or was cleared"
    for called, others in ((KEYS, made.keys[:stop]), (VALUES, made.values[:stop])):
        best = _alike(others, rows[row])
        if best is not None and (called, best) != (what, row):
            return f"the row holds {called} {best}: rows are put or kept in the wrong place"
    return "probably rows are overwritten, or kept from another sequence"


def _alike(rows: Floats, wanted: Floats) -> int | None:
    """The row that points the same way; None where none does."""
    scores = rows @ wanted / (np.linalg.norm(rows, axis=1) * np.linalg.norm(wanted) + 1e-30)
    best = int(np.argmax(scores))
    return best if scores[best] > ALIKE else None

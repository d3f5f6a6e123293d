"""Compares a weight of an axmodel with the checkpoint, and explains a difference.

The comparison is exact: a value rounded to nearest lies within half a quantisation step of the original, and a scale
maps the largest of its values to the end of the range. The cause is found by trying: other tensors, other orders of
rows and columns, other scales, other roundings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from axc.doctor.stored import ENDS, Floats, Levels, Stored, dequantized
from axrun.format.dtypes import FLOAT8, from_float32, to_float32

Bools = NDArray[np.bool_]
Weight = Callable[[str], Floats]

SLACK = 1e-3  # tolerance in steps: float32 arithmetic on levels up to 127
# how far values may exceed the range, as a factor: 1 / the smallest factor that the quantiser tries for a scale
LARGEST = {"INT8": 1.03, "INT4": 1.6, "FLOAT8E4M3FN": 1.001, "FLOAT8E5M2": 1.001}
SMALLEST = {"FLOAT": 2.0**-100, "FLOAT16": 2.0**-14}  # scales below this are not exact, or stored as zeros
# relative error of a match
CLOSE = {"FLOAT": 1e-5, "FLOAT16": 2e-3, "BFLOAT16": 1e-2, "INT8": 0.04, "INT4": 0.4}
CLOSE |= {"FLOAT8E4M3FN": 0.06, "FLOAT8E5M2": 0.12}
ROWS = 2048  # rows per step
MOST_SHIFT = 64
MOST_WHOLE = 1 << 27  # maximum bytes of a tensor to compare as a whole
SAMPLE = 48  # rows to search for in the checkpoint
CHECKPOINT = "the checkpoint's own values there are not finite"
UNRELATED = "all values differ"  # the cause if no other is found


@dataclass(frozen=True)
class Fault:
    """A difference and its cause. `where`: the rows of the tensor, or "" for all."""

    tensor: str
    where: str
    cause: str
    expected: str
    seen: str

    @property
    def text(self) -> str:
        return f"{self.tensor}{', ' + self.where if self.where else ''}: {self.cause}"


def compare(stored: Stored, name: str, weight: Callable[[str, int, int], Floats]) -> tuple[int, int] | None:
    """The first rows [start, stop) with values that rounding does not explain; None if there are none."""
    for start in range(0, stored.shape[0], ROWS):
        stop = min(start + ROWS, stored.shape[0])
        if wrong_elements(stored, start, stop, weight(name, start, stop)).any():
            return start, stop
    return None


def unlike_calibrated(
    stored: Stored, name: str, weight: Callable[[str, int, int], Floats], recorded: float
) -> Fault | None:
    """Calibrated levels are not the nearest ones; instead their relative error must equal the recorded one."""
    noise = signal = 0.0
    for start in range(0, stored.shape[0], ROWS):
        stop = min(start + ROWS, stored.shape[0])
        wanted = weight(name, start, stop)
        noise += float(np.square(stored.values(start, stop) - wanted, dtype=np.float64).sum())
        signal += float(np.square(wanted, dtype=np.float64).sum())
    error = (noise / signal) ** 0.5 if signal else 0.0
    if abs(error - recorded) <= SLACK * recorded + SLACK**2:
        return None
    cause = "levels or scales differ from those of the calibration, or the checkpoint is another one"
    return Fault(stored.name, "", cause, f"a relative error of {recorded:.4g}", f"{error:.4g}")


def wrong_elements(stored: Stored, start: int, stop: int, wanted: Floats) -> Bools:
    """Which elements of rows [start, stop) are not the checkpoint's values rounded to nearest."""
    if not stored.scaled:
        return np.asarray(to_float32(from_float32(wanted, stored.dtype), stored.dtype) != stored.values(start, stop))
    levels, scales = stored.levels(start, stop), stored.scale_rows(start, stop)
    low, high = (np.repeat(ends, stored.block, axis=1) for ends in stored.ends(start, stop))
    rows, columns = levels.shape
    with np.errstate(all="ignore"):
        ideal = (wanted.reshape(rows, -1, stored.block) / scales[:, :, None]).reshape(rows, columns)
        away = ~(np.abs(ideal - levels) <= (0.5 + SLACK) * _steps(ideal, stored.dtype))
        most = LARGEST[stored.dtype]
        away &= ~((levels >= high) & (ideal > high) & (ideal <= most * np.maximum(high, -low)))
        away &= ~((levels <= low) & (ideal < low) & (ideal >= most * np.minimum(low, -high)))
        ratios = _ratios(stored, scales, wanted)
        coarse = ~((ratios <= 1 + SLACK) & (ratios >= 1 / LARGEST[stored.dtype]))
        same = (dequantized(levels, scales, stored.block) == wanted).reshape(rows, -1, stored.block).all(axis=2)
        coarse &= ~same  # the checkpoint is quantised itself, with scales of its own rule
    return np.asarray(away | ~np.isfinite(ideal) | np.repeat(coarse, stored.block, axis=1))


def _steps(ideal: Floats, dtype: str) -> Floats | float:
    """The distance of neighbouring levels at `ideal`, in units of the scale."""
    kind = FLOAT8.get(dtype)
    if kind is None:
        return 1.0
    exponent = np.maximum(np.frexp(ideal)[1] - 1, 1 - kind.bias)
    return np.asarray(np.ldexp(np.ones_like(ideal), exponent - kind.mantissa), np.float32)


@np.errstate(all="ignore")
def _ratios(stored: Stored, scales: Floats, wanted: Floats) -> Floats:
    """Ratios [n, blocks] of the scales to those that map the largest value to the end of the range.

    With zero points: to those that map all values and 0 to the whole range. 1 for blocks of (almost) zeros.
    """
    low, high = ENDS[stored.dtype]
    values = wanted.reshape(len(wanted), -1, stored.block)
    if stored.zeros is None:
        full = np.abs(values).max(axis=2) / np.float32(-low)
    else:
        full = (np.maximum(values.max(axis=2), 0) - np.minimum(values.min(axis=2), 0)) / np.float32(high - low)
    smallest = SMALLEST[stored.scale_dtype]
    small = (full <= smallest) & np.isfinite(scales)
    return np.asarray(np.where(small, 1, np.abs(scales) / np.maximum(full, smallest)), np.float32)


def explain(
    stored: Stored,
    name: str,
    start: int,
    stop: int,
    weight: Weight,
    others: Mapping[str, str],
    head_dim: int = 0,
) -> Fault:
    """Explains the difference in rows [start, stop) found by `compare`. `others`: descriptions of tensors by name."""
    wanted = weight(name)
    bad = wrong_elements(stored, start, stop, wanted[start:stop])
    bad_rows = np.flatnonzero(bad.reshape(stop - start, -1).any(axis=1)) + start
    few = len(bad_rows) <= max(4, (stop - start) // 8) and len(bad_rows) < stored.shape[0]
    seen = stored.values(start, stop)
    first = tuple(int(x) for x in np.argwhere(bad)[0])
    where = _rows(bad_rows) if few else ""
    values = (
        f"{wanted[start:stop][first]:.6g} at {[first[0] + start, *first[1:]]}{_rounding(stored)}",
        f"{seen[first]:.6g}",
    )
    tests = _few_rows if few else _whole
    for cause in tests(stored, wanted, bad, bad_rows, start, stop):
        return Fault(stored.name, where, cause, *values)
    if not few or len(bad_rows) > 1:
        for cause in _elsewhere(stored, name, seen, start, weight, others, head_dim):
            return Fault(stored.name, where, cause, *values)
    share = float(bad.mean())
    count = int(bad.sum())
    cause = f"{count} of {bad.size} values differ" if share < 0.5 else UNRELATED
    return Fault(stored.name, where, cause, *values)


def _rounding(stored: Stored) -> str:
    return "" if stored.dtype == "FLOAT" else f", rounded to {stored.dtype}"


def _few_rows(
    stored: Stored, wanted: Floats, bad: Bools, bad_rows: NDArray[np.intp], start: int, stop: int
) -> Iterator[str]:
    """Causes that affect few rows."""
    rows = stored.values(start, stop)[bad_rows - start]
    right = wanted[bad_rows]
    plural = "rows are" if len(bad_rows) > 1 else "row is"
    if not np.isfinite(right).all():
        yield CHECKPOINT
    if stored.scaled:
        yield from _coarse(stored, wanted, bad_rows)
    if not np.isfinite(rows).all():
        yield f"the {plural} not finite"
    elif (rows == 0).all():
        yield f"the {plural} zero"
    elif stored.scaled:
        yield from _scales(stored, wanted, bad_rows)
    if rows.ndim == 2 and rows.shape[1] >= 8:
        for index, row in zip(bad_rows, rows, strict=True):
            found = _row_of(row, wanted)
            if found is not None and found != index:
                yield f"row {index} holds row {found} of the checkpoint"
            break
        if _near(-rows, right, stored.dtype):
            yield "its sign is flipped"
    if bad.sum() == 1:
        yield "one value differs: the file is damaged, or memory was"


def _coarse(stored: Stored, wanted: Floats, bad_rows: NDArray[np.intp]) -> Iterator[str]:
    """Finds scales that are not finite, and scales that are far too large for correctly rounded levels."""
    scales = np.concatenate([stored.scale_rows(int(row), int(row) + 1) for row in bad_rows])
    off = ~np.isfinite(scales)
    swapped = _ratios(stored, scales.byteswap(), wanted[bad_rows])
    if off.any() and not ((swapped <= 1 + SLACK) & (swapped >= 1 / LARGEST[stored.dtype])).all():
        yield f"{_count(off, 'scale')} not finite: {scales[off][0]}"
    levels = np.concatenate([stored.levels(int(row), int(row) + 1) for row in bad_rows])
    ratios = _ratios(stored, scales, wanted[bad_rows])
    with np.errstate(all="ignore"):
        ideal = (wanted[bad_rows].reshape(len(bad_rows), -1, stored.block) / scales[:, :, None]).reshape(levels.shape)
        fitting = (np.abs(ideal - levels) <= (0.5 + SLACK) * _steps(ideal, stored.dtype)).all()
    off = ratios > 1 + SLACK
    if fitting and off.any():
        worst = float(ratios.max())
        left = "too few levels are used" if levels[off.any(axis=1)].any() else "all levels are zero"
        yield f"{_count(off, 'scale')} up to {worst:.4g} times too large: {left}"


def _whole(
    stored: Stored, wanted: Floats, bad: Bools, bad_rows: NDArray[np.intp], start: int, stop: int
) -> Iterator[str]:
    """Causes that affect most rows and involve no other tensor."""
    rows, right = stored.values(start, stop), wanted[start:stop]
    if not np.isfinite(right).all():
        yield CHECKPOINT
    if stored.scaled:
        yield from _coarse(stored, wanted, bad_rows)
    if (rows == 0).all():
        yield "all values are zero"
    if _near(-rows, right, stored.dtype):
        yield "its sign is flipped"
    if stored.scaled:
        yield from _levels(stored, wanted, right, start, stop)
    else:
        yield from _floats(stored, rows, right, start, stop)
    if _near(rows + 1, right, stored.dtype):
        yield "1 was subtracted"
    if _near(rows - 1, right, stored.dtype):
        yield "1 was added, as for the norms of Gemma"
    ratio = _ratio(rows, right)
    if _near(rows, right * ratio, stored.dtype) and abs(ratio - 1) > 1e-4:
        yield f"it is scaled by {ratio:.4g}" if abs(ratio - 1) > 1e-3 else f"it is scaled by {ratio:.6g}"


def _floats(stored: Stored, rows: Floats, right: Floats, start: int, stop: int) -> Iterator[str]:
    kind = stored.dtype
    raw = stored.tensor.array()[start:stop]
    swapped = to_float32(np.ascontiguousarray(raw).byteswap(), kind)
    if _near(swapped, right, kind):
        yield "its byte order is swapped (big endian)"
    if kind == "BFLOAT16" and np.array_equal(raw, (right.view(np.uint32) >> 16).astype(np.uint16)):
        yield "it was truncated to bfloat16 instead of rounded to nearest"
    if kind == "BFLOAT16" and _near(np.ascontiguousarray(raw).view("<f2").astype(np.float32), right, "FLOAT16"):
        yield "the data is float16, but declared as bfloat16"
    if kind == "FLOAT16" and _near(to_float32(np.ascontiguousarray(raw).view("<u2"), "BFLOAT16"), right, "BFLOAT16"):
        yield "the data is bfloat16, but declared as float16"
    if kind == "FLOAT":
        for narrow, bits in (("BFLOAT16", 16), ("FLOAT16", 0)):
            with np.errstate(over="ignore"):
                if np.array_equal(rows, to_float32(from_float32(right, narrow), narrow)):
                    yield f"it was rounded to {narrow} before"
            if bits and np.array_equal(rows.view(np.uint32), right.view(np.uint32) >> bits << bits):
                yield f"it was truncated to {narrow} before"


def _levels(stored: Stored, wanted: Floats, right: Floats, start: int, stop: int) -> Iterator[str]:
    levels, scales = stored.levels(start, stop), stored.scale_rows(start, stop)
    kind, block = stored.dtype, stored.block
    with np.errstate(all="ignore"):
        ideal = (right.reshape(len(right), -1, block) / scales[:, :, None]).reshape(right.shape)
        step = _steps(ideal, kind)
        slack = SLACK * step
        if (np.abs(levels) <= np.abs(ideal) + slack).all() and (np.abs(ideal - levels) < step + slack).all():
            yield "it was truncated towards zero instead of rounded to nearest"
        elif ((ideal - levels > -slack) & (ideal - levels < step + slack)).mean() > 0.999:
            yield "it was rounded down instead of to nearest"
    yield from _scales(stored, wanted, np.arange(start, stop))
    if kind in FLOAT8:
        raw = stored.tensor.array()[start:stop]
        for real in FLOAT8:
            if real != kind and _near(dequantized(to_float32(raw, real), scales, block), right, real):
                yield f"the data is {real}, but declared as {kind}"
        return
    if kind == "INT4":
        other = (levels.reshape(-1, 2)[:, ::-1]).reshape(levels.shape)
        if _near(dequantized(other, scales, block), right, kind):
            yield "the nibbles of each byte are swapped: the first of two 4-bit values belongs in the low one"
        flipped = ((levels.astype(np.int16) + 16) % 16 - 8).astype(np.int8)
    else:
        flipped = (levels.astype(np.uint8) ^ np.uint8(0x80)).view(np.int8)
    if _near(dequantized(flipped, scales, block), right, kind):
        yield "its levels are unsigned with an offset, but declared as signed"
    for offset in (-1, 1):
        if np.median(np.abs(ideal - (levels.astype(np.int16) + offset))) < 0.5 < np.median(np.abs(ideal - levels)):
            yield f"its levels are off by {-offset}"


def _scales(stored: Stored, wanted: Floats, rows: NDArray[np.intp]) -> Iterator[str]:
    """Causes of wrong scales, if the levels of the rows are right."""
    levels = np.concatenate([stored.levels(int(row), int(row) + 1) for row in rows])
    scales = np.concatenate([stored.scale_rows(int(row), int(row) + 1) for row in rows])
    block = stored.block
    fitted = _fitted(levels, wanted[rows], block)
    if not _near(dequantized(levels, fitted, block), wanted[rows], stored.dtype):
        return
    with np.errstate(all="ignore"):
        ratios = scales / fitted
    off = ~(np.abs(ratios - 1) < (0.2 if stored.dtype == "INT4" else 0.02)) & (fitted != 0)
    if not off.any():
        return
    whole = _fitted(stored.levels(0, stored.shape[0]), wanted, block)
    flat = stored.scale_rows(0, stored.shape[0]).reshape(-1)
    swapped = scales.byteswap()
    if _alike(swapped, fitted):
        yield "the byte order of its scales is swapped (big endian)"
    per_row = whole.shape[1]
    if len(rows) > 1:
        for step in (*range(1, 9), *(per_row * n for n in range(1, 9) if per_row > 8 or n * per_row > 8)):
            for shift in (step, -step):
                if _alike(np.roll(flat, shift), whole.reshape(-1)):
                    unit = "row" if shift % per_row == 0 else "block"
                    count = abs(shift) // per_row if unit == "row" else abs(shift)
                    yield f"its scales are shifted by {count} {unit}{'s' if count > 1 else ''}"
    if len(rows) == len(whole) and per_row > 1 and _alike(flat.reshape(per_row, -1).T, whole):
        yield "its scales are transposed: [blocks, rows] instead of [rows, blocks]"
    if not scales[off].any():
        yield f"{_count(off, 'scale')} zero"
    values = ratios[off]
    if values.size and np.ptp(values) <= 0.05 * abs(float(np.median(values))) + 1e-6:
        yield f"{_count(off, 'scale')} {float(np.median(values)):.3g} times the right value"
    yield f"{_count(off, 'scale')} {values.min():.3g} to {values.max():.3g} times the right value"


def _fitted(levels: Levels, wanted: Floats, block: int) -> Floats:
    """The scales [n, blocks] with the least squared error for these levels."""
    cut = levels.reshape(len(levels), -1, block).astype(np.float64)
    values = wanted.reshape(cut.shape)
    power = (cut * cut).sum(axis=2)
    return np.asarray((cut * values).sum(axis=2) / np.where(power == 0, 1, power), np.float32)


def _alike(ours: Floats, theirs: Floats) -> bool:
    with np.errstate(all="ignore"):
        return bool((np.abs(ours - theirs) <= 0.2 * np.abs(theirs) + 1e-30).mean() > 0.98)


def _elsewhere(
    stored: Stored,
    name: str,
    seen: Floats,
    start: int,
    weight: Weight,
    others: Mapping[str, str],
    head_dim: int,
) -> Iterator[str]:
    """Causes with another order of rows or columns, or another tensor."""
    wanted, kind = weight(name), stored.dtype
    if seen.ndim == 2:
        rows, columns = stored.shape
        whole = stored.values() if stored.tensor.nbytes < MOST_WHOLE else None
        if whole is not None:
            transposed = "it is transposed: [in, out] instead of [out, in]"
            if _near(whole.reshape(columns, rows).T, wanted, kind):
                yield transposed
            orders = list(_row_orders(rows, head_dim))
            for cause, order in orders:
                if _near(whole, wanted[order], kind):
                    yield cause
            if stored.scaled:
                yield from _levels_elsewhere(stored, wanted, [(transposed, None), *orders])
        for cause in _shifted(seen, wanted, start, kind):
            yield cause
    for other, described in others.items():
        if other == name:
            continue
        candidate = weight(other)
        if candidate.size != wanted.size:
            continue
        if candidate.shape == wanted.shape and _near(seen, candidate[start : start + len(seen)], kind):
            yield f"it holds {described}"
        elif (
            candidate.T.shape == wanted.shape
            and stored.tensor.nbytes < MOST_WHOLE
            and _near(stored.values(), candidate.T, kind)
        ):
            yield f"it holds {described}, transposed"
    if seen.ndim == 2:
        yield from _mapped(seen, wanted, start)
    elif len(seen) >= 8 and np.allclose(np.sort(seen), np.sort(wanted), rtol=CLOSE[kind]):
        yield "its values are in another order"


def _levels_elsewhere(
    stored: Stored, wanted: Floats, orders: Sequence[tuple[str, NDArray[np.intp] | None]]
) -> Iterator[str]:
    """Levels in a wrong order, with scales in the right order."""
    levels, scales = stored.levels(0, stored.shape[0]), stored.scale_rows(0, stored.shape[0])
    for cause, order in orders:
        if order is None:
            mended = np.ascontiguousarray(levels.reshape(levels.shape[::-1]).T)
        else:
            mended = np.empty_like(levels)
            mended[order] = levels
        if _near(dequantized(mended, scales, stored.block), wanted, stored.dtype):
            yield f"{cause}; its scales are in the right order"
    for step in range(1, min(9, len(levels))):
        for shift in (step, -step):
            if _near(dequantized(np.roll(levels, shift, axis=0), scales, stored.block), wanted, stored.dtype):
                yield f"its rows are shifted by {step}, but not its scales"


def _row_orders(rows: int, head_dim: int) -> Iterator[tuple[str, NDArray[np.intp]]]:
    """Row orders known from converters."""
    index = np.arange(rows)
    if head_dim and rows % head_dim == 0:
        heads = index.reshape(-1, head_dim)
        halves = heads.reshape(-1, 2, head_dim // 2)
        interleaved = halves.transpose(0, 2, 1).reshape(-1)
        apart = heads.reshape(-1, head_dim // 2, 2).transpose(0, 2, 1).reshape(-1)
        yield "the rows of each head are interleaved for rotary embedding, as GGUF files have them", interleaved
        yield "the rows of each head are de-interleaved, although they were not interleaved", apart
        yield "the halves of each head are swapped", halves[:, ::-1].reshape(-1)
        if len(heads) > 1:
            yield "the heads are in the opposite order", heads[::-1].reshape(-1)
    yield "its rows are in the opposite order", index[::-1]


def _shifted(seen: Floats, wanted: Floats, start: int, kind: str) -> Iterator[str]:
    for step in range(1, min(MOST_SHIFT, len(seen) - 1) + 1):
        for shift in (step, -step):
            rows = (np.arange(start, start + len(seen)) + shift) % len(wanted)
            if not _near(seen[:4], wanted[rows[:4]], kind):
                continue
            inside = (np.arange(start, start + len(seen)) + shift == rows) | (len(seen) == len(wanted))
            if _near(seen[inside], wanted[rows[inside]], kind) or _near(seen[:-step], wanted[rows[:-step]], kind):
                yield f"its rows are shifted by {abs(shift)}: row {start} holds row {rows[0]} of the checkpoint"
    for step in range(1, min(MOST_SHIFT, seen.shape[1] - 1) + 1):
        for shift in (step, -step):
            if _near(seen, np.roll(wanted[start : start + len(seen)], shift, axis=1), kind):
                yield f"its columns are shifted by {abs(shift)}"


def _mapped(seen: Floats, wanted: Floats, start: int) -> Iterator[str]:
    """Rows of the checkpoint in an unknown order."""
    if len(wanted) > 1 << 15 or seen.shape[1] < 8:
        return
    chosen = np.linspace(0, len(seen) - 1, min(SAMPLE, len(seen))).astype(int)
    found = [_row_of(seen[row], wanted) for row in chosen]
    moved = [(row + start, to) for row, to in zip(chosen, found, strict=True) if to is not None]
    if len(moved) == len(chosen) and any(row != to for row, to in moved):
        row, to = next((row, to) for row, to in moved if row != to)
        yield f"its rows are in another order: row {row} holds row {to} of the checkpoint"


def _row_of(row: Floats, wanted: Floats) -> int | None:
    """The index of the checkpoint's row that is similar to `row`, or None."""
    with np.errstate(all="ignore"):
        cosine = wanted @ row / (np.linalg.norm(wanted, axis=1) * np.linalg.norm(row) + 1e-30)
    best = int(np.argmax(cosine))
    return best if cosine[best] > 0.9 else None


@np.errstate(all="ignore")
def _near(seen: Floats, wanted: Floats, kind: str) -> bool:
    """Whether `seen` equals `wanted` up to rounding."""
    if seen.shape != wanted.shape or not seen.size:
        return False
    norm = float(np.linalg.norm(wanted))
    return norm > 0 and float(np.linalg.norm(seen - wanted)) <= CLOSE[kind] * norm


def _ratio(seen: Floats, wanted: Floats) -> float:
    with np.errstate(all="ignore"):
        ratio = float(np.vdot(seen, wanted) / max(float(np.vdot(wanted, wanted)), 1e-30))
    return ratio if np.isfinite(ratio) else 0.0


def _rows(rows: NDArray[np.intp]) -> str:
    if len(rows) == 1:
        return f"row {rows[0]}"
    if rows[-1] - rows[0] == len(rows) - 1:
        return f"rows {rows[0]} to {rows[-1]}"
    return f"{len(rows)} rows from {rows[0]} on"


def _count(off: Bools, what: str) -> str:
    total = int(off.sum())
    if off.all() and total > 1:
        return f"all {what}s here are"
    return f"one {what} is" if total == 1 else f"{total} {what}s are"


__all__ = ["Fault", "compare", "explain", "wrong_elements"]

"""The stage `embedding`: compares the table with the checkpoint's rows, rounded to the nearest bfloat16."""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from axrun.agreement import cosines
from axrun.doctor.context import Context
from axrun.doctor.figures import TABLE_ROWS
from axrun.doctor.report import Finding
from axrun.format.dtypes import bf16_to_f32

STAGE = "embedding"
BLOCK = 4096  # rows per step of a search
SHIFTS = (1, -1, 2, -2, 3, -3, 4, -4, 8, -8, 16, -16)

Bits = NDArray[np.uint16]


def embedding(context: Context) -> str | Finding:
    """Compares some rows by value, and all rows by checksum."""
    bundle, figures = context.bundle, context.figures
    table: Bits = np.memmap(bundle.embedding_path, "<u2", "r", shape=(bundle.vocab_size, bundle.hidden_size))
    ids = figures.table_ids.astype(np.int64)
    wanted = figures.table_rows.astype("<u2")
    bad = np.flatnonzero((table[ids] != wanted).any(axis=1))
    starts = range(0, bundle.vocab_size, TABLE_ROWS)
    sums = np.array([zlib.crc32(table[at : at + TABLE_ROWS].tobytes()) for at in starts], np.uint32)
    blocks = np.flatnonzero(sums != figures.table_sums)
    if not len(bad) and not len(blocks):
        return f"all {bundle.vocab_size:,} rows by checksum, {len(ids)} of them by value"
    many = f"{len(blocks):,} of {len(sums):,} blocks of {TABLE_ROWS} rows differ"
    if not len(bad):
        first = int(blocks[0]) * TABLE_ROWS
        part = f"rows {first} to {min(first + TABLE_ROWS, bundle.vocab_size) - 1}" + ", and more" * (len(blocks) > 1)
        wanted_words, cause = f"checksum {int(figures.table_sums[blocks[0]]):08x}", "some values there were changed"
        return _finding(context, part, wanted_words, f"{int(sums[blocks[0]]):08x}; {many}", cause)
    row = int(bad[0])
    token, seen = int(ids[row]), np.asarray(table[ids[row]])
    expected, found = (bf16_to_f32(values)[:4].tolist() for values in (wanted[row], seen))
    cause = _cause(table, ids, wanted, len(bad), token)
    words = (", ".join(f"{value:.5g}" for value in values) + ", ..." for values in (expected, found))
    return _finding(context, f"row of token {token}", next(words), f"{next(words)}; {many}", cause)


def _cause(table: Bits, ids: NDArray[np.int64], wanted: Bits, bad: int, token: int) -> str:
    rows = table[ids]
    if (rows.byteswap() == wanted).all():
        return "values are big-endian, expected little-endian"
    for shift in SHIFTS:
        inside = (ids + shift >= 0) & (ids + shift < len(table))
        if bad == len(ids) and (table[ids[inside] + shift] == wanted[inside]).all():
            return f"all rows are shifted by {shift:+d}: a row was lost or inserted"
    apart = (wanted.astype(np.int32) & 0x7FFF) - (rows.astype(np.int32) & 0x7FFF)
    same_sign = (wanted >> 15 == rows >> 15) | (rows & 0x7FFF == 0)
    if same_sign.all() and ((apart == 0) | (apart == 1)).all():
        return "values were truncated to bfloat16 instead of rounded to the nearest"
    if same_sign.all() and (np.abs(apart) <= 1).all():
        return "values were rounded twice, or from another precision than the checkpoint has"
    with np.errstate(all="ignore"):
        ours, theirs = bf16_to_f32(np.ascontiguousarray(rows)), bf16_to_f32(wanted)
        ratio = float((ours * theirs).sum() / (theirs * theirs).sum())
        if (cosines(ours, theirs) > 0.9999).all():
            return f"every row is scaled by {ratio:.4g}: a scale that belongs in the model was applied to the table"
    place = _elsewhere(table, wanted[list(ids).index(token)])
    if place is not None:
        return f"the expected row is that of token {place}: rows were swapped, or the table is in another order"
    if bad < len(ids) / 2:
        return f"{bad} of {len(ids)} rows differ: the file is partly damaged"
    return "the table belongs to another checkpoint"


def _elsewhere(table: Bits, row: Bits) -> int | None:
    for start in range(0, len(table), BLOCK):
        found = np.flatnonzero((table[start : start + BLOCK] == row).all(axis=1))
        if len(found):
            return start + int(found[0])
    return None


def _finding(context: Context, part: str, expected: str, seen: str, cause: str) -> Finding:
    file = context.bundle.embedding_file
    return Finding(
        STAGE, part, file, expected, seen, cause, "Build the bundle again, or write the table again with axc embed."
    )

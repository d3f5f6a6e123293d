"""Stage `embedding`: compares the table's rows with transformers' table, rounded to bfloat16 by torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from axc.doctor import weight_faults
from axc.doctor.case import REBUILD, Case
from axc.doctor.stored import Floats, Stored
from axrun.doctor.report import Finding
from axrun.format.axmodel import Tensor
from axrun.format.dtypes import bf16_to_f32

ROWS = 4096
Bits = NDArray[np.uint16]


def examine(case: Case) -> str | Finding:
    """Every row, bit by bit."""
    bundle = case.bundle
    file = bundle.embedding_file
    shape = (bundle.vocab_size, bundle.hidden_size)
    size = bundle.embedding_path.stat().st_size
    if size != 2 * shape[0] * shape[1]:
        return Finding(
            "embedding", "size", file, f"{2 * shape[0] * shape[1]} bytes: {shape[0]} rows of {shape[1]} in bfloat16",
            f"{size} bytes", _of_size(size, shape), REBUILD,
        )  # fmt: skip
    table: Bits = np.memmap(bundle.embedding_path, "<u2", "r", shape=shape)
    weight = case.reference.embedding
    for start in range(0, shape[0], ROWS):
        rows = table[start : start + ROWS]
        wrong = bf16_to_f32(rows) != bf16_to_f32(rounded(weight(start, start + ROWS)))
        if wrong.any():
            return _finding(case, table, start, wrong, weight)
    return f"all {shape[0]} rows of {shape[1]} match the checkpoint"


def rounded(values: Floats) -> Bits:
    """The bits of torch's bfloat16, which rounds to the nearest, ties to even."""
    import torch

    bits: Any = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    return np.asarray(bits)


def _of_size(size: int, shape: tuple[int, int]) -> str:
    rows, columns = shape
    if size == 4 * rows * columns:
        return "the rows are float32: the conversion to bfloat16 is missing"
    if size < 2 * rows * columns:
        return f"the file ends after {size / 2 / columns:.1f} rows"
    return "the table belongs to another model or vocabulary"


def _finding(case: Case, table: Bits, start: int, wrong: NDArray[np.bool_], weight: Any) -> Finding:
    row, column = (int(at) for at in np.argwhere(wrong)[0])
    right = weight(start + row, start + row + 1)[0]
    seen, first = bf16_to_f32(table[start + row]), start + row
    rows = np.flatnonzero(wrong.any(axis=1)) + start
    named = f"row {first}" if len(rows) == 1 else f"{len(rows)} of {len(wrong)} rows, first row {first}"
    return Finding(
        "embedding",
        named,
        case.bundle.embedding_file,
        f"{right[column]:.6g} in row {first}, column {column}",
        f"{seen[column]:.6g}",
        _why(case, table, start, wrong),
        REBUILD,
    )


def _why(case: Case, table: Bits, start: int, wrong: NDArray[np.bool_]) -> str:
    """Tests the whole table like any weight: for other rows, rounding, byte order or tensors."""
    whole = np.asarray(table)
    raw = whole.view(np.uint8).reshape(-1)
    tensor = Tensor("embedding", "BFLOAT16", tuple(table.shape), 0, raw.nbytes, memoryview(raw.tobytes()))
    stored = Stored("the table", tensor)
    names = {"model.embed_tokens.weight": "the embedding"}
    names |= {name: name for name in case.reference.parameters() if name == "lm_head.weight"}

    def weight(name: str) -> Floats:
        return case.reference.embedding(0, None) if name == "embedding" else case.reference.weight(name)

    fault = weight_faults.explain(stored, "embedding", start, start + len(wrong), weight, names, 0)
    if weight_faults.UNRELATED in fault.cause:
        return fault.cause + "; probably the table of another checkpoint"
    return fault.cause

"""The embedding table: reads it from a checkpoint and writes the bfloat16 file that the runner maps.

The vendor's recipe has three steps with files between them (npy, raw float32, raw bfloat16); a build goes straight
from the checkpoint to the last one, with the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from axc.axmodel.writer import write_file
from axc.checkpoints import BLOCK_ELEMENTS, EMBEDDING, Checkpoint, widen
from axc.quantizer.floats import convert
from axc.weights import Source, Tensors, blocks
from axrun.errors import BadInput
from axrun.format.dtypes import f32_to_bf16

NAME = "model.embed_tokens.weight"
BFLOAT16_FILE = f"{NAME}.bfloat16.bin"
# name prefixes in multimodal checkpoints
PREFIXES = ("", "llm.", "language_model.", "model.language_model.")


def bfloat16_blocks(source: Source, tensors: Tensors) -> Iterator[NDArray[np.uint16]]:
    """The table [vocab, hidden] in blocks of rows, rounded to the nearest bfloat16."""
    dtype = source.dtype(tensors)
    for _, block in blocks(source, tensors):
        try:
            yield convert(block, dtype, "BFLOAT16")
        except OverflowError as overflow:
            name = next(iter(source.reads))
            raise BadInput(f"{name} holds {overflow}: the embedding of a bundle is bfloat16") from None


def extract(checkpoint_path: Path, output_path: Path) -> Path:
    """Step 1: writes the table of a checkpoint as float32 `model.embed_tokens.weight.npy` to a folder."""
    checkpoint = Checkpoint.open(checkpoint_path)
    names = [prefix + EMBEDDING for prefix in PREFIXES if prefix + EMBEDDING in checkpoint.tensors]
    if not names:
        raise BadInput(f"{checkpoint_path} has no tensor {EMBEDDING}, nor one with a prefix of {PREFIXES[1:]}")
    stored = checkpoint.tensors[names[0]]
    output_path.mkdir(parents=True, exist_ok=True)
    target = output_path / f"{NAME}.npy"

    def pieces() -> Iterator[bytes | NDArray[Any]]:
        yield _npy_header(stored.shape)
        for _, block in checkpoint.blocks(stored.name):
            yield widen(block, stored.dtype)

    write_file(target, pieces())
    return target


def float32(npy: Path, output: Path) -> Path:
    """Step 2: converts a float32 .npy to raw little-endian float32."""
    table = _open_npy(npy)
    write_file(output, (table[start : start + _rows(table)] for start in range(0, len(table), _rows(table))))
    return output


def bfloat16(raw: Path, output: Path) -> Path:
    """Step 3: converts raw float32 to raw bfloat16, rounded to nearest even."""
    try:
        values = np.memmap(raw, "<f4", "r")
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {raw} as raw float32: {error}") from None
    step = BLOCK_ELEMENTS
    write_file(output, (f32_to_bf16(values[start : start + step]) for start in range(0, len(values), step)))
    return output


def _rows(table: NDArray[Any]) -> int:
    return max(BLOCK_ELEMENTS // int(table.shape[1]), 1)


def _npy_header(shape: tuple[int, ...]) -> bytes:
    import io

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _open_npy(path: Path) -> NDArray[np.float32]:
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy can raise anything for a damaged header
        raise BadInput(f"cannot read {path}: {error}\nMake it with `axc embed extract`.") from None
    if not isinstance(table, np.ndarray):
        raise BadInput(f"{path} is an archive of arrays; expected one\nMake it with `axc embed extract`.")
    if table.dtype != np.dtype("<f4") or table.ndim != 2 or not table.size:
        raise BadInput(f"{path} holds {table.dtype}{list(table.shape)}; expected float32 [vocab, hidden]")
    return np.asarray(table)

"""Changes a single number in an axmodel file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from axrun.format import axmodel

OVERFLOW = 3e5  # as a scale of tiny-qwen2's s8 weights, every product exceeds float16


def set_float(file: Path, tensor: str, index: int, value: float) -> None:
    """Sets element `index` of a float32 tensor in the file."""
    stored = axmodel.read(file).initializers[tensor]
    assert stored.dtype == "FLOAT"
    with file.open("r+b") as opened:
        opened.seek(stored.offset + 4 * index)
        opened.write(np.float32(value).tobytes())

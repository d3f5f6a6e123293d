"""A script: runs linear axmodels with 16-bit and 8-bit activations, and in onnxruntime with input rounded the same way.

Arguments: axmodel files. Prints a line for each: path, bits, and largest |difference| / largest |value|.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from axrun.session import ax_engine, ax_int8
from tests.engine.compare import exact, filled

BLOCK = 128
ENGINES = {16: (ax_engine, 32639), 8: (ax_int8, 127)}  # the session module, and the largest level


def rounded(x: Any, top: int) -> Any:
    """float32 [.., columns] rounded to levels from -top to top, with a scale for every 128 columns of a row."""
    blocks = np.zeros((*x.shape[:-1], -(-x.shape[-1] // BLOCK), BLOCK), np.float32)
    blocks.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]] = x
    peaks = np.abs(blocks).max(-1, keepdims=True)
    levels = np.rint(blocks * (np.float32(top) / peaks))
    return (levels * (peaks / np.float32(top))).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]


def worst(path: Path, bits: int) -> float:
    engine, top = ENGINES[bits]
    ours, plain = engine.open_session(path), exact(path)
    difference = 0.0
    for group in ours.groups:
        seen = filled(ours, group.index)
        seen["input"][0, -1] = np.where(np.arange(seen["input"].shape[-1]) % 5, 1, -1)  # every level is the largest
        wanted = {name: array.copy() for name, array in seen.items()}
        wanted["input"][...] = rounded(wanted["input"], top)
        ours.bind(group.index, seen).run()
        plain.bind(group.index, wanted).run()
        error = np.abs(seen["output"] - wanted["output"]).max() / np.abs(wanted["output"]).max()
        difference = max(difference, float(error) if np.isfinite(error) else np.inf)
    return difference


def main() -> None:
    for path in map(Path, sys.argv[1:]):
        for bits in ENGINES:
            print(path, bits, worst(path, bits))


if __name__ == "__main__":
    main()

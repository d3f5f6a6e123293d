"""A script: runs rows of a linear axmodel together with different numbers of other rows, with 16-bit and 8-bit
activations.

Arguments: axmodel files. Prints a line for each and each precision: path, bits, sha256 of the outputs of single rows,
and the numbers of rows with which some row had other bits than alone.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

from axrun.session import libax_engine
from tests.engine.rounded import ENGINES

ROWS = 140  # a packed weight is multiplied with 128 of them at most
PICKED = (*range(40), *range(ROWS - 12, ROWS))
COUNTS = (*range(2, 14), 31)  # of rows in a run: tiles of every height, and several of them


def outputs(session: Any, x: Any, count: int) -> Any:
    """Of all rows, `count` to a run."""
    (info,) = session.groups[0].outputs
    made = []
    for start in range(0, x.shape[1], count):
        rows = np.ascontiguousarray(x[:, start : start + count])
        out = np.zeros((1, rows.shape[1], info.shape[-1]), np.float32)
        session.bind(0, {"input": rows, "output": out}).run()
        made.append(out[0])
    return np.concatenate(made)


def main() -> None:
    print(libax_engine.library().isa)
    for path in map(Path, sys.argv[1:]):
        for bits, (engine, _) in ENGINES.items():
            session = engine.open_session(path)
            (info,) = session.groups[0].inputs
            x = np.random.default_rng(0).standard_normal((1, ROWS, info.shape[-1]), np.float32)
            alone = outputs(session, x[:, PICKED], 1).tobytes()
            odd = [count for count in COUNTS if outputs(session, x[:, PICKED], count).tobytes() != alone]
            if outputs(session, x, ROWS)[PICKED, :].tobytes() != alone:
                odd.append(ROWS)
            print(path, bits, hashlib.sha256(alone).hexdigest(), *odd)


if __name__ == "__main__":
    main()

"""A program: runs tokens through a bundle cut in many ways, and prints digests of what they became.

Arguments: number of cuts, seed, bundles. One line for each cut: bundle, sha256 of hidden states, of logits, and of K
and V. The first cut is one token at a time in an empty cache. The others are random: the lengths of chunks, whether
chunks are padded to shape groups, and how many tokens are reused from a cache that held others behind them. AXC_ISA and
AXC_THREADS select kernels and threads.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from axrun.format.bundle import Bundle
from axrun.model import Model
from axrun.session import libax_engine

TOKENS = 100


def drawn(random: np.random.Generator, most: int) -> Iterator[int]:
    """Endless random lengths of chunks, uniform in their logarithm."""
    while True:
        yield int(2 ** random.uniform(0, np.log2(most + 1)))


def outcome(model: Model, ids: list[int], cuts: Iterator[int], first: int = 0) -> list[bytes]:
    """Hidden states and logits of the tokens from `first` on; K and V of all."""
    position, hidden, logits = first, [], []
    while position < len(ids):
        for rows in (rows for _, rows in model.hidden(ids[position : position + next(cuts)], position)):
            hidden.append(rows.tobytes())
            logits.append(model.post(rows).tobytes())
            position += len(rows)
    cache = model.decoder.cache
    rows_of = [np.ascontiguousarray(array[:, : len(ids)]).tobytes() for array in [*cache.keys, *cache.values]]
    return [b"".join(hidden), b"".join(logits), b"".join(rows_of)]


def main() -> None:
    count, seed = int(sys.argv[1]), int(sys.argv[2])
    print(libax_engine.library().isa)
    for path in map(Path, sys.argv[3:]):
        random = np.random.default_rng(seed)
        model = Model.load(Bundle.open(path))
        decoder, width = model.decoder, len(model.embedding([0])[0].tobytes())
        ids = np.random.default_rng(0).integers(0, model.embedding._table.shape[0], TOKENS).tolist()
        whole: list[bytes] = []
        for cut in range(count):
            kept = 0
            decoder.flexible, decoder.cache.length = True, 0
            if cut:
                decoder.flexible = bool(random.integers(2))
                kept = int(random.integers(TOKENS - 1))
                others = [*ids[:kept], *random.integers(0, 99, TOKENS - kept).tolist()]
                outcome(model, others, drawn(random, 64))
                decoder.cache.truncate(kept)
            seen = outcome(model, ids, drawn(random, 64) if cut else iter(lambda: 1, 0), kept)
            whole = whole or seen
            skipped = [width * kept, len(whole[1]) // TOKENS * kept, 0]
            seen = [old[:size] + new for old, new, size in zip(whole, seen, skipped, strict=True)]
            print(path, *(hashlib.sha256(part).hexdigest() for part in seen))


if __name__ == "__main__":
    main()

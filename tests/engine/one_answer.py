"""A program: runs tokens through a bundle cut in many ways, and prints digests of what they became.

Arguments: number of cuts, seed, bundles. One line for each cut: bundle, sha256 of hidden states, of logits, and of K
and V. The first cut is one token at a time in an empty cache. The others are random: the lengths of chunks, whether
chunks are padded to shape groups or share their runs with other sequences, and how many tokens are reused from a cache
that held others behind them. AXC_ISA and AXC_THREADS select kernels and threads.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from axrun.batch import Batch
from axrun.errors import Failure
from axrun.format.bundle import Bundle
from axrun.job import Job
from axrun.model import Model
from axrun.sequence import Sequence
from axrun.session import libax_engine

TOKENS = 100
MATES, MOST = 4, 64  # other sequences, and tokens of each in a run


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
    return [b"".join(hidden), b"".join(logits), kept(model, len(ids))]


def kept(model: Model, tokens: int) -> bytes:
    """K and V of the first tokens."""
    cache = model.decoder.cache
    return b"".join(np.ascontiguousarray(array[:, :tokens]).tobytes() for array in [*cache.keys, *cache.values])


class Company:
    """Runs the tokens of a model together with random ones of random other sequences."""

    def __init__(self, model: Model, random: np.random.Generator) -> None:
        self._model, self._random = model, random
        self._batch = Batch(model, (MATES + 1) * MOST)
        self._mates = [Sequence(model.another()) for _ in range(MATES)]

    def outcome(self, ids: list[int], cuts: Iterator[int], first: int) -> list[bytes]:
        """As the function `outcome`."""
        sequence = Sequence.__new__(Sequence)  # whose cache is not empty
        sequence.model, sequence.ids = self._model, ids[:first]
        hidden, logits = [], []
        while sequence.length < len(ids):
            own = Job(sequence, ids[sequence.length : sequence.length + next(cuts)], 0)
            jobs = [own, *(self._job(mate, next(cuts)) for mate in self._mates if self._random.integers(3))]
            jobs = [jobs[place] for place in self._random.permutation(len(jobs))]
            for job, seen in zip(jobs, self._batch.run(jobs), strict=True):
                assert not isinstance(seen, Failure), seen
                job.sequence.ids += job.tokens
                if job is own:
                    hidden.append(seen.hidden.tobytes())
                    logits += [row.tobytes() for row in seen.logits]
        return [b"".join(hidden), b"".join(logits), kept(self._model, len(ids))]

    def _job(self, mate: Sequence, count: int) -> Job:
        if mate.length + count > mate.context:
            mate.truncate(int(self._random.integers(mate.length)))
            count = 1
        return Job(mate, self._random.integers(0, 99, count).tolist(), 0)


def main() -> None:
    count, seed = int(sys.argv[1]), int(sys.argv[2])
    print(libax_engine.library().isa)
    for path in map(Path, sys.argv[3:]):
        random = np.random.default_rng(seed)
        model = Model.load(Bundle.open(path))
        decoder, width = model.decoder, len(model.embedding([0])[0].tobytes())
        ids = np.random.default_rng(0).integers(0, model.embedding._table.shape[0], TOKENS).tolist()
        company = Company(model, random)
        whole: list[bytes] = []
        for cut in range(count):
            reused = 0
            decoder.flexible, decoder.cache.length = True, 0
            if cut:
                decoder.flexible = bool(random.integers(2))
                reused = int(random.integers(TOKENS - 1))
                others = [*ids[:reused], *random.integers(0, 99, TOKENS - reused).tolist()]
                outcome(model, others, drawn(random, MOST))
                decoder.cache.truncate(reused)
            if cut and random.integers(2):
                seen = company.outcome(ids, drawn(random, MOST), reused)
            else:
                seen = outcome(model, ids, drawn(random, MOST) if cut else iter(lambda: 1, 0), reused)
            whole = whole or seen
            skipped = [width * reused, len(whole[1]) // TOKENS * reused, 0]
            seen = [old[:size] + new for old, new, size in zip(whole, seen, skipped, strict=True)]
            print(path, *(hashlib.sha256(part).hexdigest() for part in seen))


if __name__ == "__main__":
    main()

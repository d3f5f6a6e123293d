"""From the logits of a token to the token: processors, then the likeliest one or a draw."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from axrun.sampling import Sampling
from axrun.sampling.draw import Floats, Scratch, draw, expect_finite, weights
from axrun.sampling.processors import processors


class Sampler:
    """Draws the tokens of one answer; the same seed and logits give the same tokens."""

    def __init__(self, sampling: Sampling, seed: int | None = None) -> None:
        self.sampling = sampling
        self._processors = processors(sampling)
        self._random = np.random.Generator(np.random.PCG64(seed))
        self._scratch = Scratch(0)

    def __call__(self, logits: Floats, ids: Sequence[int] = (), start: int = 0) -> int:
        """The token behind `ids`, for float32 logits [vocab], which stay as they are; `ids` from `start` on are the
        answer's. Raises CheckFailed when they are not finite."""
        if self.sampling.temperature:
            return draw(self.weights(logits, ids, start), self._random.random())
        logits = self.processed(logits, ids, start)
        token = int(logits.argmax())
        expect_finite(logits[token])
        return token

    def weights(self, logits: Floats, ids: Sequence[int] = (), start: int = 0) -> Floats:
        """What a token is drawn from, at a temperature above 0; the next call overwrites it."""
        return weights(self.processed(logits, ids, start), self.sampling, self._scratch)

    def processed(self, logits: Floats, ids: Sequence[int] = (), start: int = 0) -> Floats:
        """The logits behind all processors, which the next call overwrites; themselves where there is none."""
        if len(logits) != len(self._scratch.kept):
            self._scratch = Scratch(len(logits))
        if not self._processors:
            return logits
        out = self._scratch.kept
        np.copyto(out, logits)
        for process in self._processors:
            process(out, ids, start)
        return out

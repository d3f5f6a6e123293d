"""From logits to a token: apply the processors, then take the most likely token or sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from axrun.sampling import Sampling
from axrun.sampling.draw import Floats, Scratch, draw, expect_finite, weights
from axrun.sampling.processors import processors


class Sampler:
    """Samples the tokens of one answer; the same seed and logits give the same tokens."""

    def __init__(self, sampling: Sampling, seed: int | None = None) -> None:
        self.sampling = sampling
        self._random = np.random.Generator(np.random.PCG64(seed))
        self._processors = processors(sampling, self._random)
        self._scratch = Scratch(0)

    def __call__(self, logits: Floats, ids: Sequence[int] = (), start: int = 0) -> int:
        """The token after `ids`, from float32 logits [vocab], which stay unmodified; ids[start:] are the answer.

        Raises CheckFailed if the logits are not finite.
        """
        if self.sampling.temperature:
            return draw(self.weights(logits, ids, start), self._random.random())
        logits = self.processed(logits, ids, start)
        token = int(logits.argmax())
        expect_finite(logits[token])
        return token

    def weights(self, logits: Floats, ids: Sequence[int] = (), start: int = 0) -> Floats:
        """The weights to sample from, at a temperature above 0; the next call overwrites them."""
        return weights(self.processed(logits, ids, start), self.sampling, self._scratch)

    def processed(self, logits: Floats, ids: Sequence[int] = (), start: int = 0) -> Floats:
        """The logits after all processors; the next call overwrites them. Without processors, the input itself."""
        if len(logits) != len(self._scratch.kept):
            self._scratch = Scratch(len(logits))
        if not self._processors:
            return logits
        out = self._scratch.kept
        np.copyto(out, logits)
        for process in self._processors:
            process(out, ids, start)
        return out

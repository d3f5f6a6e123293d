"""Processors that exclude tokens by the shape of the distribution at temperature 1, whatever was excluded before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class TopNSigma:
    """Keeps the logits that are at most `n` standard deviations below the largest.

    Tang et al., Top-n-sigma, https://arxiv.org/abs/2411.07641
    """

    def __init__(self, n: float) -> None:
        self._n = n

    def __call__(self, logits: Floats, ids: Sequence[int], start: int) -> None:
        finite = logits[np.isfinite(logits)]
        if len(finite):
            logits[logits < finite.max() - np.float32(self._n) * finite.std()] = -np.inf


class Typical:
    """Keeps the smallest set of tokens whose surprise is closest to the entropy, with a total probability of `mass`.

    Meister et al., Locally Typical Sampling, https://arxiv.org/abs/2202.00666, as transformers has it.
    """

    def __init__(self, mass: float) -> None:
        self._mass = mass

    def __call__(self, logits: Floats, ids: Sequence[int], start: int) -> None:
        kept = np.flatnonzero(np.isfinite(logits))
        if not len(kept):
            return
        shifted = (logits[kept] - logits[kept].max()).astype(np.float64)
        logs = shifted - np.log(np.exp(shifted).sum())
        shares = np.exp(logs)
        order = np.argsort(np.abs(-logs - (-(shares * logs).sum())), kind="stable")
        count = 1 + int(np.searchsorted(np.cumsum(shares[order]), self._mass))
        logits[kept[order[count:]]] = -np.inf


class Xtc:
    """With `probability`, excludes all tokens of at least `threshold` except the least likely of them.

    Exclude Top Choices, https://github.com/oobabooga/text-generation-webui/pull/6335
    """

    def __init__(self, probability: float, threshold: float, random: np.random.Generator) -> None:
        self._probability, self._threshold, self._random = probability, threshold, random

    def __call__(self, logits: Floats, ids: Sequence[int], start: int) -> None:
        if self._random.random() >= self._probability:
            return
        peak = logits.max()
        total = np.exp((logits - peak).astype(np.float64)).sum()
        least = peak + np.log(self._threshold * total)  # the logit of this probability
        top = np.flatnonzero(logits >= least)
        if len(top) > 1:
            top = top[np.argsort(-logits[top], kind="stable")]
            logits[top[:-1]] = -np.inf

"""Sampling from logits: temperature, top-k, top-p and min-p, in the order of transformers, with a single sort."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from axrun.errors import CheckFailed
from axrun.sampling import Sampling

Floats = NDArray[np.float32]

BUCKET_BITS = 16  # low bits of a float32 ignored by the bucket sort: weights in a bucket differ by less than 1 %
BLOCK = 512  # weights per block: sums and maxima are computed per block before searching inside one
PEAK = 64  # number of most likely tokens to try first for top_p


class Scratch:
    """Arrays [vocab] reused for every token: page faults of fresh memory cost more than the computation."""

    def __init__(self, vocab: int) -> None:
        self.kept = np.empty(vocab, np.float32)
        self.worth = np.empty(vocab, np.float64)
        self.buckets = np.empty(vocab, np.intp)
        self.chosen = np.empty(vocab, np.bool_)


def weights(logits: Floats, sampling: Sampling, scratch: Scratch | None = None) -> Floats:
    """Unnormalised probabilities [vocab] at a temperature above 0; 0 for tokens that are cut off.

    Ties keep the lower ids. The result is an array of `scratch`, if given. Raises CheckFailed if the logits are not
    finite.
    """
    scratch = Scratch(len(logits)) if scratch is None else scratch
    kept = scratch.kept
    np.divide(logits, np.float32(sampling.temperature), out=kept)
    peak = kept.max()
    expect_finite(peak)
    np.exp(np.subtract(kept, peak, out=kept), out=kept)
    kept = _cut(kept, sampling, scratch)
    if sampling.min_p:
        kept[kept < np.float32(sampling.min_p)] = 0  # the most likely token has weight 1
    return kept


def _cut(kept: Floats, sampling: Sampling, scratch: Scratch) -> Floats:
    """Sets the weights that top-k and top-p exclude to 0."""
    top_k = sampling.top_k if sampling.top_k < len(kept) else 0
    if not top_k and sampling.top_p == 1:
        return kept
    need = 0.0 if top_k else sampling.top_p * float(kept.sum(dtype=np.float64))
    ids = likeliest(kept, top_k or PEAK, scratch)
    few = Scratch(len(ids))
    few.kept[:] = kept[ids]
    if top_k:
        keep_head(few.kept, None, top_k, few)
        need = sampling.top_p * float(few.kept.sum(dtype=np.float64))
    elif float(few.kept.sum(dtype=np.float64)) < need:  # a flat distribution
        np.copyto(scratch.worth, kept)
        return keep_head(kept, scratch.worth, need, scratch)
    if sampling.top_p < 1:
        few.worth[:] = few.kept
        keep_head(few.kept, few.worth, need, few)
    kept.fill(0)
    kept[ids] = few.kept
    return kept


def likeliest(kept: Floats, count: int, scratch: Scratch) -> NDArray[np.intp]:
    """Rising ids that include the `count` largest weights; few others if `count` is small."""
    peaks = np.maximum.reduceat(kept, np.arange(0, len(kept), BLOCK))
    if count > len(peaks):
        return np.arange(len(kept))
    least = np.partition(peaks, -count)[-count]  # `count` blocks have a maximum at least as large
    return np.flatnonzero(np.greater_equal(kept, least, out=scratch.chosen))


def keep_head(kept: Floats, worth: NDArray[np.float64] | None, need: float, scratch: Scratch) -> Floats:
    """Keeps the smallest set of largest weights [vocab] whose `worth` adds up to `need`, and sets the others to 0.

    `worth` None: each counts 1. Non-negative floats sort like their bit patterns, so the upper bits give the bucket,
    and only the bucket in which the sum is reached has to be sorted.
    """
    buckets, chosen = scratch.buckets, scratch.chosen
    np.right_shift(kept.view(np.uint32), BUCKET_BITS, out=buckets, casting="unsafe")
    held = np.cumsum(np.bincount(buckets, worth)[::-1])
    place = min(int(np.searchsorted(held, need)), len(held) - 1)
    last = len(held) - 1 - place
    ids = np.flatnonzero(np.equal(buckets, last, out=chosen))
    ids = ids[np.argsort(-kept[ids], kind="stable")]
    before = held[place - 1] if place else 0
    shares = np.ones(len(ids)) if worth is None else worth[ids]
    ids = ids[: 1 + int(np.searchsorted(before + np.cumsum(shares)[:-1], need))]
    stay = kept[ids]
    np.multiply(kept, np.greater(buckets, last, out=chosen), out=kept)
    kept[ids] = stay
    return kept


def draw(kept: Floats, chance: float) -> int:
    """Inverse transform sampling: the token at the fraction `chance`, in [0, 1), of the cumulative weights."""
    ends = np.cumsum(np.add.reduceat(kept, np.arange(0, len(kept), BLOCK), dtype=np.float64))
    target = min(chance * ends[-1], np.nextafter(ends[-1], 0))
    block = int(np.searchsorted(ends, target, side="right"))
    start = block * BLOCK
    inside = kept[start : start + BLOCK]
    sums = np.cumsum(inside, dtype=np.float64) + (ends[block - 1] if block else 0.0)
    place = int(np.searchsorted(sums, target, side="right"))
    # place can be past the end, since the block was summed in another order
    return start + (place if place < len(sums) else int(np.flatnonzero(inside)[-1]))


def expect_finite(value: np.float32) -> None:
    """Raises CheckFailed for a logit that is not finite."""
    if not np.isfinite(value):
        raise overflow(value)


def overflow(logit: np.float32) -> CheckFailed:
    """The error for a logit that is not finite."""
    return CheckFailed(
        f"the model returned a logit of {logit}: it overflows or its files are damaged\n"
        "Run `axrun run --verify`, or build with --hidden_state_type bf16 or fp32."
    )

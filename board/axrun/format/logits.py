"""Reference logits on disk: predictions of the float32 checkpoint over a text, small enough for a board.

For each position, the file has the K most likely tokens with their log-probabilities, and the log of the remaining
mass: K + 1 buckets. The Kullback-Leibler divergence over the buckets is exact if K is the whole vocabulary, else a
lower bound (merging outcomes cannot add divergence: Cover and Thomas, Elements of Information Theory, 2.7).
`about.json` in the file says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from axrun.errors import BadInput
from axrun.format import npz

NAME = "reference.npz"  # in a bundle
SCHEMA = 1
# array: (kind of dtype, number of dimensions)
ARRAYS = {
    "tokens": ("u", 2),
    "ids": ("u", 3),
    "logprobs": ("f", 3),
    "rest": ("f", 2),
    "following": ("f", 2),
    "continuations": ("u", 2),
}


@dataclass(frozen=True)
class ReferenceLogits:
    """W windows of N tokens, of which the first N - 1 are scored. Logarithms are natural.

    `tokens` uint32 [W, N]; `ids` uint [W, N-1, K], most likely first, and their `logprobs` float32; `rest` float32
    [W, N-1], the log of the mass outside them, -inf if K is the vocabulary; `following` float32 [W, N-1], the
    log-probability of the token that follows. `continuations` uint32 [C, G]: greedy answers of the
    checkpoint after the first `prompt` tokens of the first C windows. `about`: vocab_size, prompt, provenance.
    """

    tokens: NDArray[np.uint32]
    ids: NDArray[Any]
    logprobs: NDArray[np.float32]
    rest: NDArray[np.float32]
    following: NDArray[np.float32]
    continuations: NDArray[np.uint32]
    about: Mapping[str, Any]

    @property
    def exact(self) -> bool:
        """Whether divergences are exact, or lower bounds."""
        return bool(self.ids.shape[2] == self.about["vocab_size"])

    @property
    def prompt(self) -> int:
        """Number of tokens before a continuation."""
        return int(self.about["prompt"])

    def encode(self) -> bytes:
        """The bytes of the file; the same values give the same bytes."""
        about = {**self.about, "schema": SCHEMA, "divergence": "exact" if self.exact else "lower bound"}
        return npz.encode({name: getattr(self, name) for name in ARRAYS}, about)


def read(path: Path) -> ReferenceLogits:
    """Reads and validates reference logits.

    Raises BadInput if the file cannot be read, has another format, or holds impossible values.
    """
    try:
        arrays, about = npz.read(path, ARRAYS, SCHEMA)
    except npz.Damaged as error:
        raise _damaged(path, str(error)) from None
    logits = ReferenceLogits(**arrays, about=about)
    fault = _fault(logits)
    if fault:
        raise _damaged(path, fault)
    return logits


def _fault(logits: ReferenceLogits) -> str:
    """Describes the first invalid value; empty if all are valid."""
    about, (windows, length), top = logits.about, logits.tokens.shape, logits.ids.shape[2]
    vocabulary, prompt = about.get("vocab_size"), about.get("prompt")
    if type(vocabulary) is not int or not 2 <= vocabulary < 1 << 31:
        return f"its vocab_size is {vocabulary!r:.40}"
    if windows < 1 or length < 2 or not 1 <= top <= vocabulary:
        return f"it has {windows} windows of {length} tokens and {top} most likely of {vocabulary}"
    for name, shape in (
        ("ids", (windows, length - 1, top)),
        ("logprobs", (windows, length - 1, top)),
        ("rest", (windows, length - 1)),
        ("following", (windows, length - 1)),
    ):
        if getattr(logits, name).shape != shape:
            return f"its {name} are {list(getattr(logits, name).shape)}, expected {list(shape)}"
    if len(logits.continuations) > windows or type(prompt) is not int or not 1 <= prompt < length:
        return f"it has {len(logits.continuations)} continuations of {prompt!r:.40} tokens"
    for name in ("tokens", "ids", "continuations"):
        if int(getattr(logits, name).max(initial=0)) >= vocabulary:
            return f"its {name} are outside the vocabulary of {vocabulary}"
    mass = np.exp(logits.logprobs).sum(axis=2, dtype=np.float64) + np.exp(logits.rest)
    if not np.abs(mass - 1).max() < 1e-3 or not logits.following.max() <= 1e-5 or np.isneginf(logits.following).any():
        return "its probabilities do not add up to 1"
    if (logits.logprobs[..., 1:] > logits.logprobs[..., :-1]).any():
        return "its most likely tokens do not come first"
    return ""


def _damaged(path: Path, what: str) -> BadInput:
    return BadInput(f"{path} has no valid reference logits: {what}\nWrite them again with `axc reference`.")

"""Embeddings of texts: a vector for each, from the hidden states behind the final norm."""

from __future__ import annotations

from collections import abc
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from axrun.errors import BadInput, CheckFailed
from axrun.format.bundle import Bundle
from axrun.format.pooling import MEAN, Pooling
from axrun.job import Computed, Job, run_alone
from axrun.load import DEFAULTS, Loading
from axrun.sequence import Sequence
from axrun.text.tokenizer import Tokenizer

Vector = NDArray[np.float32]

LEAST_NORM = 1e-12  # a shorter vector keeps its length, as in torch.nn.functional.normalize


class TooLong(BadInput):
    """A text with more tokens than the bundle takes."""


@dataclass(frozen=True)
class Texts:
    """Turns texts into the token ids that a bundle makes embeddings of."""

    bundle: Bundle
    tokenizer: Tokenizer
    pooling: Pooling

    @classmethod
    def of(cls, bundle: Bundle, tokenizer: Tokenizer) -> Texts:
        """Raises BadInput for a bundle that makes no embeddings."""
        if bundle.flag("ret_postnorm") != "True":
            raise BadInput(
                f"{bundle.path} makes no embeddings: its post model does not return the normalised hidden state\n"
                "Build it again with --ret_postnorm."
            )
        return cls(bundle, tokenizer, Pooling.of(bundle.manifest))

    @property
    def limit(self) -> int:
        """Maximum number of tokens of a text."""
        context = self.bundle.kv_cache_len
        return context if self.pooling.max_tokens is None else min(context, self.pooling.max_tokens)

    def ids(self, text: str | abc.Sequence[int], truncate: bool = False) -> list[int]:
        """The token ids of a text, with the special tokens that the tokenizer adds; token ids stay as they are.

        `truncate`: only the beginning of a text that is too long. Raises BadInput.
        """
        ids = self.tokenizer.encode(text) if isinstance(text, str) else list(text)
        if len(ids) > self.limit and truncate:
            ids = self.tokenizer.beginning(text, self.limit) if isinstance(text, str) else ids[: self.limit]
        if not ids:
            raise BadInput("a text is empty; at least one token is needed")
        if len(ids) > self.limit:
            raise TooLong(
                f"a text has {len(ids)} tokens, and this model's limit is {self.limit}; shorten it or truncate"
            )
        self.tokenizer.expect_within(ids, self.bundle.vocab_size)
        return ids

    def expect_dimensions(self, dimensions: int | None) -> None:
        """Raises BadInput for more dimensions than an embedding has."""
        most = self.bundle.hidden_size
        if dimensions is not None and not 1 <= dimensions <= most:
            raise BadInput(f"dimensions is {dimensions}; expected 1 to {most}")

    def finish(self, pooled: Vector, dimensions: int | None = None) -> Vector:
        """The embedding: the first `dimensions` of a pooled vector, normalised if the checkpoint does so."""
        cut = pooled[:dimensions]
        if not self.pooling.normalize:
            return cut
        return (cut / max(float(np.linalg.norm(cut.astype(np.float64))), LEAST_NORM)).astype(np.float32)


def ask(sequence: Sequence, ids: abc.Sequence[int], mode: str) -> Generator[Job | Vector, Computed, None]:
    """Yields jobs, whose results have to be sent, and then the pooled hidden state of a text, float32 [H].

    Raises CheckFailed if the model returns values that are not finite, or no hidden states.
    """
    post = sequence.model.post
    if not post.normalises:
        raise CheckFailed("the post model has no output postnorm; build the bundle again with --ret_postnorm")
    reused = 0 if mode == MEAN else sequence.reusable(ids)
    sequence.truncate(reused)
    total, done = np.zeros(post.hidden_size), reused
    while done < len(ids):
        computed = yield Job(sequence, ids[done:], len(ids) - done)
        hidden = computed.hidden
        sequence.ids += ids[done : done + len(hidden)]
        done += len(hidden)
        if mode == MEAN:
            total += post.normalised(hidden).sum(axis=0, dtype=np.float64)
    yield (total / len(ids)).astype(np.float32) if mode == MEAN else post.normalised(hidden[-1:])[0].copy()


@dataclass(frozen=True)
class Embedded:
    """The embeddings [n, dimensions] of n texts, and their number of tokens."""

    vectors: NDArray[np.float32]
    tokens: int


def embed(
    path: Path,
    texts: abc.Sequence[str],
    dimensions: int | None = None,
    truncate: bool = False,
    loading: Loading = DEFAULTS,
) -> Embedded:
    """Loads a bundle and makes the embeddings of texts. Raises BadInput, CheckFailed."""
    bundle = loading.open(path)
    reader = Texts.of(bundle, Tokenizer.open(bundle.hf))
    reader.expect_dimensions(dimensions)
    listed = [reader.ids(text, truncate) for text in texts]
    sequence = Sequence(loading.load(bundle))
    vectors = [
        reader.finish(pooled, dimensions)
        for ids in listed
        for pooled in run_alone(ask(sequence, ids, reader.pooling.mode))
    ]
    return Embedded(np.array(vectors), sum(map(len, listed)))


def numbers(vector: Vector) -> list[float]:
    """The shortest decimal numbers that are these float32 values."""
    return [float(str(value)) for value in vector]

"""Log probabilities of tokens: the float32 log-softmax of the raw logits, before temperature and penalties."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from axrun.errors import CheckFailed

Floats = NDArray[np.float32]


class Rated(NamedTuple):
    """A token, its bytes and its log probability."""

    id: int
    bytes: bytes
    logprob: float


class Scored(NamedTuple):
    """A token of the prompt or the answer, with the most likely alternatives.

    `logprob` is None for the first token of a prompt. `start` is the character offset of its text.
    `ends`: a stop token.
    """

    id: int
    bytes: bytes
    logprob: float | None
    top: tuple[Rated, ...]
    start: int
    ends: bool = False


def log_softmax(logits: Floats) -> Floats:
    """The log-softmax of logits [n, vocab] or [vocab]. Raises CheckFailed if they are not finite."""
    if not np.isfinite(logits).all():
        raise CheckFailed("the model returned logits that are not finite: it overflows or its files are damaged")
    shifted = logits - logits.max(-1, keepdims=True)
    total = np.exp(shifted).sum(-1, dtype=np.float64, keepdims=True)
    return np.asarray(shifted - np.log(total), np.float32)


def likeliest(logprobs: Floats, count: int) -> Iterator[int]:
    """Ids of the `count` highest entries of [vocab]; ties by id."""
    count = min(count, len(logprobs))
    if not count:
        return iter(())
    least = np.partition(logprobs, -count)[-count]
    ids = np.flatnonzero(logprobs >= least)
    return (int(token) for token in ids[np.argsort(-logprobs[ids], kind="stable")][:count])


def chat_logprobs(scored: Sequence[Scored]) -> dict[str, Any]:
    """The format of chat completions; a stop token is not part of the content."""

    def entry(token: Scored | Rated) -> dict[str, Any]:
        text = token.bytes.decode("utf-8", "replace")
        return {"token": text, "logprob": token.logprob, "bytes": list(token.bytes)}

    content = [
        {**entry(token), "top_logprobs": [entry(rated) for rated in token.top]} for token in scored if not token.ends
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(scored: Sequence[Scored]) -> dict[str, Any]:
    """The format of completions. Tokens that are not valid UTF-8 stay distinct as `bytes:\\xe2\\x82`."""
    top: list[dict[str, float] | None] = []
    for token in scored:
        entries: dict[str, float] = {}
        for rated in token.top:
            entries.setdefault(_spelled(rated.bytes), rated.logprob)
        if token.logprob is not None:
            entries.setdefault(_spelled(token.bytes), token.logprob)
        top.append(None if token.logprob is None else entries)
    return {
        "tokens": [_spelled(token.bytes) for token in scored],
        "token_logprobs": [token.logprob for token in scored],
        "top_logprobs": top,
        "text_offset": [token.start for token in scored],
    }


def _spelled(text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)

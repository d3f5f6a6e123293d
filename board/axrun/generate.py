"""Token after token: prefill, draw, feed back, until the model stops or a limit is reached."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from axrun.model import Model
from axrun.sampling import Sampler, Sampling


class Token(NamedTuple):
    """`seconds` it took: the first one's is the time to first token."""

    id: int
    seconds: float


@dataclass
class Stats:
    """How a generation went. Rates are tokens a second.

    `steps` are the tokens drawn after the first, in `decode_seconds`; the stopping one is among them, though it is
    not handed out. `stop` is why it ended: eos, length (max_tokens) or context; empty while it runs.
    """

    prompt_tokens: int = 0
    tokens: int = 0
    ttft_seconds: float = 0.0
    steps: int = 0
    decode_seconds: float = 0.0
    stop: str = ""

    @property
    def prefill_rate(self) -> float:
        return self.prompt_tokens / self.ttft_seconds if self.ttft_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """The first token excluded, as the vendor's newest runner counts."""
        return self.steps / self.decode_seconds if self.decode_seconds else 0.0


def generate(
    model: Model,
    ids: Sequence[int],
    sampling: Sampling,
    max_tokens: int | None = None,
    stop_ids: Collection[int] = (),
    *,
    past: Sequence[int] = (),
    seed: int | None = None,
    stats: Stats | None = None,
    between: Callable[[], None] = lambda: None,
) -> Iterator[Token]:
    """Continues what is in the model's K/V cache with `ids`, then with tokens of its own, which are yielded.

    A token of `stop_ids` ends it and is not yielded. `max_tokens` None goes on to the end of the context.
    The repetition penalty looks at `past` too: what the cache holds. `between` is called after each chunk that is
    prefilled and each token; it may raise, and the cache then holds whole tokens, `model.length` of them.
    Raises BadInput when `ids` are none or do not fit the context.
    """
    stats = Stats() if stats is None else stats
    sampler = Sampler(sampling, seed)
    seen, given = [*past, *ids], ids
    stats.prompt_tokens = len(ids)
    while True:
        if max_tokens is not None and stats.tokens >= max_tokens:
            stats.stop = "length"
            return
        started = time.perf_counter()
        token = sampler(model.forward(given, between=between), seen)
        seconds = time.perf_counter() - started
        if given is ids:
            stats.ttft_seconds = seconds
        else:
            stats.steps += 1
            stats.decode_seconds += seconds
        if token in stop_ids:
            stats.stop = "eos"
            return
        seen.append(token)
        given = [token]
        stats.tokens += 1
        yield Token(token, seconds)
        if model.length == model.context:
            stats.stop = "context"
            return

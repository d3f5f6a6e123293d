"""The decoding loop, the only one: prefill, draw, feed back, until the model stops or a limit is reached.

Each step is one run of the engine, so that several answers can take turns and a user can stop one.
"""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from axrun.model import Logits
from axrun.sampling import Sampling
from axrun.sampling.sampler import Sampler
from axrun.sequence import Array, Sequence

EOS, LENGTH, CONTEXT = "eos", "length", "context"

# The token behind ids, for logits [vocab] that stay as they are; from `start` on the ids are the answer's.
Choose = Callable[[Logits, abc.Sequence[int], int], int]


class Prefilled(NamedTuple):
    """A chunk of the prompt is in the cache, up to token `done`; `hidden` are its hidden states [n, H]."""

    done: int
    hidden: Array


class Token(NamedTuple):
    """A token that was drawn, from `logits` [vocab], before any processor.

    `seconds` it took: the first one's is the time to first token. `stop` is empty, or why the answer ends with it: eos
    (a stop token, which is none of the answer's), length (max_tokens) or context.
    """

    id: int
    logits: Logits
    seconds: float
    stop: str


@dataclass
class Stats:
    """How a generation went. Rates are tokens a second.

    `prompt_tokens` were prefilled, `reused` ones before them were in the cache. `steps` are the tokens drawn after the
    first, in `decode_seconds`; the stopping one is among them, though it is none of the `tokens` of the answer. `stop`
    is why it ended, as of a Token; empty while it runs.
    """

    prompt_tokens: int = 0
    tokens: int = 0
    ttft_seconds: float = 0.0
    steps: int = 0
    decode_seconds: float = 0.0
    stop: str = ""
    reused: int = 0

    @property
    def prefill_rate(self) -> float:
        return self.prompt_tokens / self.ttft_seconds if self.ttft_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """The first token excluded, as the vendor's newest runner counts."""
        return self.steps / self.decode_seconds if self.decode_seconds else 0.0


def steps(
    sequence: Sequence,
    prompt: abc.Sequence[int],
    choose: Choose,
    max_tokens: int | None = None,
    stop_ids: Collection[int] = (),
    *,
    reuse: int | None = None,
    stats: Stats | None = None,
) -> Iterator[Prefilled | Token]:
    """Answers a prompt: the sequence becomes the prompt and then the answer, except for its last token.

    The first `reuse` tokens of the sequence are kept, which are the prompt's too; None keeps as many as possible. Each
    chunk of the prompt yields a Prefilled, then each token a Token; the next step overwrites their arrays. A caller may
    stop between steps: the sequence then holds whole tokens. `max_tokens` None: up to the end of the context.
    Raises BadInput when the prompt is empty or does not fit the context, CheckFailed for logits or layers that are not
    finite.
    """
    stats = Stats() if stats is None else stats
    reused = sequence.reusable(prompt) if reuse is None else reuse
    sequence.truncate(reused)
    stats.reused, stats.prompt_tokens = reused, len(prompt) - reused
    clock = time.perf_counter
    started, spent, done = clock(), 0.0, reused
    for hidden in sequence.extend(prompt[reused:]):
        done += len(hidden)
        spent += clock() - started
        yield Prefilled(done, hidden)
        started = clock()
    start, context, post = len(prompt), sequence.context, sequence.model.post
    first = True
    while stats.tokens != max_tokens:
        logits = post(hidden[-1:])[0]
        token = choose(logits, sequence.ids, start)
        spent += clock() - started
        if first:
            first, stats.ttft_seconds = False, spent
        else:
            stats.steps += 1
            stats.decode_seconds += spent
        if token in stop_ids:
            stop = EOS
        else:
            stats.tokens += 1
            stop = CONTEXT if sequence.length == context else LENGTH if stats.tokens == max_tokens else ""
        stats.stop = stop
        yield Token(token, logits, spent, stop)
        if stop:
            return
        started, spent = clock(), 0.0
        (hidden,) = sequence.extend([token])
    stats.stop = LENGTH


def forced(tokens: abc.Sequence[int]) -> Choose:
    """Chooses given tokens, whatever the logits are, and 0 after the last one (teacher forcing)."""
    return lambda logits, ids, start: tokens[len(ids) - start] if len(ids) - start < len(tokens) else 0


def generate(
    sequence: Sequence,
    prompt: abc.Sequence[int],
    sampling: Sampling,
    max_tokens: int | None = None,
    stop_ids: Collection[int] = (),
    *,
    seed: int | None = None,
    stats: Stats | None = None,
) -> Iterator[Token]:
    """The tokens of an answer, as of `steps`; a stop token is not yielded."""
    for step in steps(sequence, prompt, Sampler(sampling, seed), max_tokens, stop_ids, stats=stats):
        if isinstance(step, Token) and step.stop != EOS:
            yield step

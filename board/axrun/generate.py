"""The decoding loop, shared by all commands: prefill, sample, feed back, until a stop token or a limit.

Each step is one run of the engine, so that the server can interleave answers and a user can stop one.
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

# (logits [vocab], ids, start) -> next token after `ids`. Does not modify the logits; ids[start:] are the answer so far.
Choose = Callable[[Logits, abc.Sequence[int], int], int]


class Prefilled(NamedTuple):
    """A prefilled chunk: `done` tokens of the prompt are in the cache; `hidden` [n, H] are its hidden states."""

    done: int
    hidden: Array


class Token(NamedTuple):
    """A sampled token, with its raw `logits` [vocab].

    `seconds` is the time it took; for the first one, the time to first token. `stop` is the reason if the answer ends
    here: eos (a stop token, not part of the answer), length (max_tokens) or context; else empty.
    """

    id: int
    logits: Logits
    seconds: float
    stop: str


@dataclass
class Stats:
    """Statistics of a generation. Rates are in tokens per second.

    `prompt_tokens` were prefilled; `reused` tokens before them were already in the cache. `steps` counts the tokens
    sampled after the first one, in `decode_seconds`, including a stop token, which is not counted in `tokens`. `stop`
    is the reason for the end, as in Token; empty while running.
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
        """Excludes the first token, like the vendor's newest runner."""
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
    """Generates an answer. Afterwards the sequence holds the prompt and the answer without its last token.

    Keeps the first `reuse` tokens of the sequence, which must equal those of the prompt; None: as many as possible.
    Yields a Prefilled per chunk of the prompt, then a Token per token; the next step overwrites their arrays. A caller
    may stop between steps; the sequence is then consistent. `max_tokens` None: up to the end of the context.
    Raises BadInput if the prompt is empty or does not fit the context, CheckFailed for logits or layers that are not
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
    """Teacher forcing: chooses the given tokens whatever the logits are, and 0 after the last one."""
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
    """Yields the tokens of an answer, without the stop token; arguments as for `steps`."""
    for step in steps(sequence, prompt, Sampler(sampling, seed), max_tokens, stop_ids, stats=stats):
        if isinstance(step, Token) and step.stop != EOS:
            yield step

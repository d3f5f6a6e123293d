"""The decoding loop, shared by all commands: prefill, sample, feed back, until a stop token or a limit.

The loop does not run the engine. It asks for its tokens to be computed, one job at a time, and continues with the
result: `steps` runs the jobs of one answer, the server those of several answers together.
"""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Union

from axrun.decoder import expect_room
from axrun.errors import BadInput, CheckFailed
from axrun.job import Computed, Job, run_alone
from axrun.model import Logits
from axrun.sampling import Sampling
from axrun.sampling.sampler import Sampler
from axrun.sequence import Array, Sequence
from axrun.speculation.guesser import Guesser

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
    is the reason for the end, as in Token; empty while running. Of `guessed` tokens, `accepted` were right.
    """

    prompt_tokens: int = 0
    tokens: int = 0
    ttft_seconds: float = 0.0
    steps: int = 0
    decode_seconds: float = 0.0
    stop: str = ""
    reused: int = 0
    guessed: int = 0
    accepted: int = 0

    @property
    def prefill_rate(self) -> float:
        return self.prompt_tokens / self.ttft_seconds if self.ttft_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Excludes the first token, like the vendor's newest runner."""
        return self.steps / self.decode_seconds if self.decode_seconds else 0.0


Asking = Generator[Union[Job, Prefilled, Token], Computed, None]


def ask(
    sequence: Sequence,
    prompt: abc.Sequence[int],
    choose: Choose,
    max_tokens: int | None = None,
    stop_ids: Collection[int] = (),
    *,
    reuse: int | None = None,
    stats: Stats | None = None,
    guesser: Guesser | None = None,
) -> Asking:
    """Generates an answer. Afterwards the sequence holds the prompt and the answer without its last token.

    Keeps the first `reuse` tokens of the sequence, which must equal those of the prompt; None: as many as possible.
    Yields Jobs, whose results have to be sent, or whose CheckFailed thrown; and a Prefilled per run of the prompt, then
    a Token per token, whose arrays the next run overwrites. A caller may stop between them; the sequence is then
    consistent, and may hold more of the answer than was yielded.
    `max_tokens` None: up to the end of the context. `guesser`: its guesses are computed in the same runs; they do not
    change the tokens.
    Raises BadInput if the prompt is empty or does not fit the context, CheckFailed for logits or layers that are not
    finite.
    """
    if not len(prompt):
        raise BadInput("the prompt is empty; at least one token is needed")
    expect_room(len(prompt), sequence.context)
    stats = Stats() if stats is None else stats
    done = sequence.reusable(prompt) if reuse is None else reuse
    sequence.truncate(done)
    stats.reused, stats.prompt_tokens = done, len(prompt) - done
    clock = time.perf_counter
    started, spent = clock(), 0.0
    while done < len(prompt):
        computed = yield Job(sequence, prompt[done:], len(prompt) - done - 1)
        sequence.ids += prompt[done : done + len(computed.hidden)]
        done += len(computed.hidden)
        spent += clock() - started
        yield Prefilled(done, computed.hidden)
        started = clock()
    guess: abc.Sequence[int] = ()
    while stats.tokens != max_tokens:
        found = []
        for place, logits in enumerate(computed.logits):
            token = choose(logits, sequence.ids, len(prompt))
            stop = EOS if token in stop_ids else _full(sequence, stats.tokens + place + 1, max_tokens)
            right = not stop and place < len(guess) and token == guess[place]
            # Other sequences run between the yields of several tokens, and overwrite the logits of the model.
            found.append((token, logits.copy() if guess else logits, stop))
            if not right:
                break
            sequence.ids.append(token)
        spent += clock() - started
        stats.guessed += len(guess)
        stats.accepted += len(found) - 1
        if guesser and stats.ttft_seconds:
            guesser.learn(len(guess), len(found) - 1, spent if computed.alone else None)
        share = spent / len(found)
        for token, logits, stop in found:
            if not stats.ttft_seconds:
                stats.ttft_seconds = spent
            else:
                stats.steps += 1
                stats.decode_seconds += share
            stats.tokens += stop != EOS
            stats.stop = stop
            yield Token(token, logits, share, stop)
        if stop:
            return
        started, spent = clock(), 0.0
        if guesser:
            room = sequence.context - sequence.length - 1
            most = room if max_tokens is None else min(room, max_tokens - stats.tokens - 1)
            guess = guesser.guess(sequence.ids, token, most)
        try:
            computed = yield Job(sequence, [token, *guess], 0)
        except CheckFailed:
            if not guess:
                raise
            sequence.clear()
            computed = yield Job(sequence, [token], 0)  # a guessed token may be what overflows
        sequence.ids.append(token)
        guess = guess[: len(computed.hidden) - 1]
    stats.stop = LENGTH


def steps(
    sequence: Sequence,
    prompt: abc.Sequence[int],
    choose: Choose,
    max_tokens: int | None = None,
    stop_ids: Collection[int] = (),
    *,
    reuse: int | None = None,
    stats: Stats | None = None,
    guesser: Guesser | None = None,
) -> Iterator[Prefilled | Token]:
    """Generates an answer as `ask`, and runs its jobs one by one."""
    return run_alone(ask(sequence, prompt, choose, max_tokens, stop_ids, reuse=reuse, stats=stats, guesser=guesser))


def _full(sequence: Sequence, tokens: int, max_tokens: int | None) -> str:
    """Why an answer ends with its `tokens`th token, if it does."""
    return CONTEXT if sequence.length == sequence.context else LENGTH if tokens == max_tokens else ""


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
    guesser: Guesser | None = None,
) -> Iterator[Token]:
    """Yields the tokens of an answer, without the stop token; arguments as for `steps`."""
    for step in steps(sequence, prompt, Sampler(sampling, seed), max_tokens, stop_ids, stats=stats, guesser=guesser):
        if isinstance(step, Token) and step.stop != EOS:
            yield step

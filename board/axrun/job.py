"""Work for the engine: tokens of a sequence that its answer needs next. Whoever runs it may run others beside it."""

from __future__ import annotations

from collections import abc
from collections.abc import Generator, Iterator
from typing import NamedTuple, TypeVar

from axrun.errors import CheckFailed
from axrun.model import Logits, Post
from axrun.sequence import Array, Sequence

T = TypeVar("T")


class Job(NamedTuple):
    """`tokens` to compute behind those of the sequence; logits are needed from the place `last` on.

    Tokens behind that place are guesses; `last` = len(tokens): no logits are needed.

    A run may compute fewer tokens, at least the first one. It does not change the ids of the sequence.
    """

    sequence: Sequence
    tokens: abc.Sequence[int]
    last: int

    def cut(self, count: int) -> Job:
        """The job of the first `count` tokens only."""
        return self._replace(tokens=self.tokens[:count])


class Computed(NamedTuple):
    """Hidden states [n, H] of the first n tokens of a job, and logits [vocab] from `last` on.

    The next run overwrites them. Taking logits raises CheckFailed where they are not finite. `alone`: no other
    sequence was in the run.
    """

    hidden: Array
    logits: Iterator[Logits]
    alone: bool = True


def compute(job: Job) -> Computed:
    """Runs as many tokens as one run of the sequence's own model takes.

    Raises BadInput for tokens that do not fit the context, CheckFailed if a layer returns values that are not finite.
    """
    sequence = job.sequence
    _, hidden = next(sequence.model.hidden(job.tokens, sequence.length))
    post, rows = sequence.model.post, hidden[job.last :]
    return Computed(hidden, iter(post(rows)) if len(rows) == 1 else logits_of(post, rows))


def run_alone(going: Generator[Job | T, Computed, None]) -> Iterator[T]:
    """Runs the jobs that a generator yields, one by one; yields everything else."""
    event = next(going, None)
    while event is not None:
        if isinstance(event, Job):
            try:
                computed = compute(event)
            except CheckFailed as error:
                event = going.throw(error)
            else:
                event = going.send(computed)
        else:
            yield event
            event = next(going, None)


def logits_of(post: Post, hidden: Array) -> Iterator[Logits]:
    """Logits [vocab] of hidden states [n, H], of all in one run; one after the other if some are not finite."""
    if not len(hidden):
        return
    try:
        yield from post(hidden)
    except CheckFailed:
        if len(hidden) == 1:
            raise
        for place in range(len(hidden)):
            yield post(hidden[place : place + 1])[0]

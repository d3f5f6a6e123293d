"""Answers that share their runs are those of the same requests alone, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from axrun.batch import Batch
from axrun.errors import BadInput, CheckFailed
from axrun.format.bundle import Bundle
from axrun.generate import Token, ask, steps
from axrun.job import Computed, Job, compute
from axrun.model import Model
from axrun.sampling import Sampling
from axrun.sampling.grammar import Compiler
from axrun.sampling.sampler import Sampler
from axrun.sequence import Sequence as TokenSequence
from axrun.serve.pace import GUESS_ROWS, Pace
from axrun.speculation import Speculation
from axrun.text.tokenizer import Tokenizer

MATES, ROWS, LENGTH = 5, 96, 24


@pytest.fixture(scope="module")
def models(bundle_s8: Path) -> list[Model]:
    """One model with a KV cache for each sequence; s8 weights, bfloat16 hidden states, a context of 255."""
    first = Model.load(Bundle.open(bundle_s8))
    return [first, *(first.another() for _ in range(MATES))]


@pytest.fixture(scope="module")
def batch(models: list[Model]) -> Batch:
    return Batch(models[0], ROWS)


@pytest.fixture(scope="module")
def grammar(bundle_s8: Path) -> Any:
    bundle = Bundle.open(bundle_s8)
    return Compiler(Tokenizer.open(bundle.hf), bundle.vocab_size).lark('start: ("yes" | "no" | /[0-9]{2}/ | " "){40}')


def outcome(tokens: Sequence[Token]) -> list[tuple[int, bytes]]:
    return [(token.id, token.logits.tobytes()) for token in tokens]


def together(batch: Batch, asked: list[Any], pace: Pace, order: Iterator[int]) -> list[list[Token]]:
    """The tokens of answers whose jobs share runs; `order` draws how many of them wait in each run."""
    made: list[list[Token]] = [[] for _ in asked]
    jobs: dict[int, Job] = {}

    def advance(number: int, result: Computed | Exception | None) -> None:
        going = asked[number]
        jobs.pop(number, None)
        if isinstance(result, Exception):
            event = going.throw(result)
        else:
            event = next(going, None) if result is None else going.send(result)
        while event is not None and not isinstance(event, Job):
            if isinstance(event, Token):
                made[number].append(event._replace(logits=event.logits.copy()))
            event = next(going, None)
        if event is not None:
            jobs[number] = event

    for number in range(len(asked)):
        advance(number, None)
    while jobs:
        numbers = sorted(jobs, key=lambda number: (number + next(order)) % len(asked))
        numbers = numbers[next(order) % len(numbers) :]
        cut = pace.cut([jobs[number] for number in numbers])
        going = [(number, job) for number, job in zip(numbers, cut, strict=True) if job is not None]
        for (number, _), result in zip(going, batch.run([job for _, job in going]), strict=True):
            advance(number, result)
    return made


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), seed=st.integers(0, 1 << 16))
def test_answers_do_not_depend_on_their_company(
    models: list[Model], batch: Batch, grammar: Any, heldout: list[int], data: st.DataObject, seed: int
) -> None:
    """Prompts and answers of any length, with grammars, sampling and guesses, in one another's runs."""
    requests = []
    for _ in range(data.draw(st.integers(2, MATES + 1))):
        start, length = data.draw(st.integers(0, 100)), data.draw(st.integers(1, 150))
        prompt = (heldout[start : start + 12] * 20 if data.draw(st.booleans()) else heldout[start:])[:length]
        own = grammar if data.draw(st.booleans()) else None
        requests.append(
            (prompt, Sampling(data.draw(st.sampled_from([0.0, 1.2])), grammar=own), data.draw(st.booleans()))
        )
    alone = []
    for prompt, sampling, _ in requests:
        going = steps(TokenSequence(models[0]), prompt, Sampler(sampling, 3), LENGTH)
        alone.append(outcome([step._replace(logits=step.logits.copy()) for step in going if isinstance(step, Token)]))
    speculation = Speculation()
    asked = []
    for model, (prompt, sampling, guesses) in zip(models, requests, strict=False):
        sequence = TokenSequence(model)
        guesser = speculation.guesser(sequence) if guesses else None
        asked.append(ask(sequence, prompt, Sampler(sampling, 3), LENGTH, guesser=guesser))
    random = np.random.default_rng(seed)
    seen = together(batch, asked, Pace(2.5, 32), iter(lambda: int(random.integers(1 << 16)), -1))
    assert [outcome(tokens) for tokens in seen] == alone


def test_a_sequence_that_is_not_finite_leaves_its_neighbours_alone(
    models: list[Model], batch: Batch, heldout: list[int]
) -> None:
    """K and V of its tokens are damaged in one layer; in another job a token is not in the vocabulary."""
    sequences = [TokenSequence(model) for model in models[:4]]
    prompts = [heldout[:30], heldout[30:70], heldout[5:25], heldout[:9]]
    for sequence, prompt in zip(sequences, prompts, strict=True):
        for _ in sequence.extend(prompt):
            pass
    new = [heldout[100:103], heldout[110:111], [1 << 30], heldout[130:135]]
    alone = []
    for sequence, tokens in zip(sequences, new, strict=True):
        if tokens[0] < 1 << 30:
            computed = compute(Job(sequence, tokens, 0))
            alone.append((computed.hidden.tobytes(), [row.tobytes() for row in computed.logits]))
            sequence.truncate(sequence.length)
    damaged = models[1].decoder.cache
    damaged.values[2][:, 3] = 0x7FC0  # a bfloat16 NaN
    results = batch.run([Job(sequence, tokens, 0) for sequence, tokens in zip(sequences, new, strict=True)])
    for place, expected in ((0, alone[0]), (3, alone[2])):
        result = results[place]
        assert isinstance(result, Computed)
        assert (result.hidden.tobytes(), [row.tobytes() for row in result.logits]) == expected
    assert isinstance(results[1], CheckFailed)
    assert str(results[1]).startswith("layer 2 returned a value that is not finite in output, at token 40")
    assert isinstance(results[2], BadInput)
    sequences[1].reset()
    assert not any(np.isnan(array.astype(np.uint32)).any() or array.any() for array in damaged.values)
    with pytest.raises(CheckFailed):
        raise results[1]


def test_rows_of_a_failed_guess_do_not_end_an_answer(models: list[Model], batch: Batch, heldout: list[int]) -> None:
    """A job with a guess fails; asked again without, it goes on as if nothing had been guessed."""

    class Wrong:
        def guess(self, ids: Sequence[int], token: int, most: int) -> Sequence[int]:
            return heldout[:2][:most]

        def learn(self, guessed: int, accepted: int, seconds: float | None) -> None:
            pass

    plain = [
        step.id
        for step in steps(TokenSequence(models[0]), heldout[:20], Sampler(Sampling()), 6)
        if isinstance(step, Token)
    ]
    going = ask(TokenSequence(models[0]), heldout[:20], Sampler(Sampling()), 6, guesser=Wrong())
    event, seen, failed = next(going), [], 0
    while event is not None:
        if isinstance(event, Job) and len(event.tokens) == 3:
            failed += 1
            event = going.throw(CheckFailed("not finite"))
        elif isinstance(event, Job):
            (result,) = batch.run([event.cut(7)])
            assert isinstance(result, Computed)
            event = going.send(result)
        else:
            seen += [event.id] if isinstance(event, Token) else []
            event = next(going, None)  # type: ignore[assignment]
    assert seen == plain
    assert failed > 2


def test_a_run_over_several_sequences_refuses_what_does_not_fit(
    models: list[Model], batch: Batch, heldout: list[int]
) -> None:
    sequence = TokenSequence(models[0])
    for _ in sequence.extend(heldout[:250]):
        pass
    (result,) = batch.run([Job(sequence, heldout[:9], 0)])
    assert isinstance(result, BadInput)
    assert str(result).startswith("259 tokens do not fit the context of 255")
    assert sequence.length == models[0].decoder.cache.length == 250


class Ids:
    """A sequence of jobs that nobody runs."""


@given(
    steps_=st.lists(st.integers(1, 40), max_size=40),
    prompts=st.lists(st.integers(2, 5000), max_size=40),
    seconds=st.tuples(st.floats(1e-4, 1), st.floats(1e-4, 10)),
    slowdown=st.floats(1.1, 20),
)
def test_cuts_fit_the_run(steps_: list[int], prompts: list[int], seconds: tuple[float, float], slowdown: float) -> None:
    pace = Pace(slowdown, 128)
    pace.learn(seconds[0], 1, 0)
    pace.learn(seconds[1], 1, 16)
    sequence: Any = Ids()
    jobs = [Job(sequence, range(count), 0) for count in steps_]
    jobs += [Job(sequence, range(count), count - 1) for count in prompts]
    cut = pace.cut(jobs)
    after = [job for job in cut[: len(steps_)] if job is not None]
    assert len(after) == len(steps_), "every answer gets its next token"
    assert sum(len(job.tokens) for job in after) <= max(GUESS_ROWS, len(after))
    read = sum(len(job.tokens) for job in cut[len(steps_) :] if job is not None)
    assert read <= (pace.rows() if steps_ else 128)
    assert not prompts or read >= min(8, sum(prompts))
    assert all(job is None or 1 <= len(job.tokens) <= len(whole.tokens) for job, whole in zip(cut, jobs, strict=True))


def test_the_pace_of_reading_follows_what_it_costs() -> None:
    pace = Pace(2.5, 128)
    assert pace.rows() == 16
    for _ in range(30):
        pace.learn(0.010, 4, 0)
        pace.learn(0.010 + pace.rows() * 0.0005, 4, pace.rows())
    assert pace.rows() in (29, 30)  # 15 ms
    for _ in range(30):
        pace.learn(0.010 + pace.rows() * 0.01, 4, pace.rows())
    assert pace.rows() == 8
    pace.learn(5.0, 0, 128)
    assert pace.rows() == 8, "runs without next tokens delay none"


def test_an_engine_that_runs_one_sequence_at_a_time_says_so(bundle_s8: Path) -> None:
    model = Model.load(Bundle.open(bundle_s8), "ort")
    assert not model.decoder.stacks
    with pytest.raises(ValueError, match="one sequence at a time"):
        Batch(model, 8)

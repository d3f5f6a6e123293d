"""Speculative decoding: whatever is guessed, the tokens are those of decoding one by one."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from axrun.errors import CheckFailed
from axrun.format.bundle import Bundle
from axrun.generate import Stats, Token, ask, steps
from axrun.job import Job, compute
from axrun.model import Model
from axrun.sampling import Sampling
from axrun.sampling.grammar import Compiler
from axrun.sampling.sampler import Sampler
from axrun.sequence import Sequence as TokenSequence
from axrun.speculation import Speculation
from axrun.speculation.guesser import MOST, ROW_STEP, Costs
from axrun.speculation.prompt_lookup import LONGEST_PAUSE, PromptLookup
from axrun.text.tokenizer import Tokenizer

LENGTH = 40


class Planned:
    """Guesses the tokens of a known answer, with wrong ones at given places, some tokens at a time."""

    def __init__(self, answer: Sequence[int], start: int, wrong: Sequence[int], counts: Sequence[int]) -> None:
        self._answer, self._start, self._wrong, self._counts = list(answer), start, set(wrong), list(counts)
        self.learnt: list[tuple[int, int]] = []

    def guess(self, ids: Sequence[int], token: int, most: int) -> Sequence[int]:
        done = len(ids) + 1 - self._start
        count = min(self._counts[done % len(self._counts)], most)
        future = self._answer[done : done + count]
        return [(t + 1) % 16 if done + i in self._wrong else t for i, t in enumerate(future)]

    def learn(self, guessed: int, accepted: int, seconds: float | None) -> None:
        self.learnt.append((guessed, accepted))


def answer(model: Model, prompt: list[int], sampling: Sampling, guesser: object = None, **more: object) -> list[Token]:
    going = steps(TokenSequence(model), prompt, Sampler(sampling, 7), LENGTH, guesser=guesser, **more)  # type: ignore[arg-type]
    return [Token(s.id, s.logits.copy(), s.seconds, s.stop) for s in going if isinstance(s, Token)]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    wrong=st.sets(st.integers(0, LENGTH), max_size=12),
    counts=st.lists(st.integers(0, MOST), min_size=1, max_size=5),
    temperature=st.sampled_from([0.0, 1.5]),
    cut=st.integers(1, 120),
)
def test_tokens_and_logits_do_not_depend_on_guesses(
    model_fp32: Model, heldout: list[int], wrong: set[int], counts: list[int], temperature: float, cut: int
) -> None:
    prompt, sampling = heldout[:cut], Sampling(temperature, repetition_penalty=1.1)
    plain = answer(model_fp32, prompt, sampling)
    guesser, stats = Planned([token.id for token in plain], cut, sorted(wrong), counts), Stats()
    guessed = answer(model_fp32, prompt, sampling, guesser, stats=stats)
    assert [token.id for token in guessed] == [token.id for token in plain]
    for one, other in zip(plain, guessed, strict=True):
        if model_fp32.decoder.exact:
            assert one.logits.tobytes() == other.logits.tobytes()
        else:
            np.testing.assert_allclose(one.logits, other.logits, rtol=0, atol=1e-4)
    assert (stats.tokens, stats.steps) == (LENGTH, LENGTH - 1)
    assert stats.guessed == sum(count for count, _ in guesser.learnt)
    assert stats.accepted == sum(right for _, right in guesser.learnt) == LENGTH - 1 - len(guesser.learnt)


def test_logits_survive_the_steps_of_other_sequences(model_fp32: Model, heldout: list[int]) -> None:
    plain = answer(model_fp32, heldout[:50], Sampling())
    guesser = Planned([token.id for token in plain], 50, [12, 20], [7])
    going = steps(TokenSequence(model_fp32), heldout[:50], Sampler(Sampling()), LENGTH, guesser=guesser)
    other = TokenSequence(model_fp32.another())
    for _ in other.extend(heldout[:3]):
        pass
    tokens = iter(plain)
    for step in going:
        if isinstance(step, Token):
            np.testing.assert_allclose(step.logits, next(tokens).logits, rtol=0, atol=1e-4)
            list(compute(Job(other, heldout[3:11], 0)).logits)  # between the tokens of a run, as other answers


def test_right_guesses_need_few_runs(model_fp32: Model, heldout: list[int]) -> None:
    plain = answer(model_fp32, heldout[:50], Sampling())
    guesser = Planned([token.id for token in plain], 50, [], [7])
    assert [token.id for token in answer(model_fp32, heldout[:50], Sampling(), guesser)] == [t.id for t in plain]
    assert len(guesser.learnt) == 5  # 1 + 7 tokens each, behind the first token


def test_tokens_of_a_run_share_its_time(model_fp32: Model, heldout: list[int]) -> None:
    plain = [token.id for token in answer(model_fp32, heldout[:50], Sampling())]
    stats, started = Stats(), time.perf_counter()
    tokens = answer(model_fp32, heldout[:50], Sampling(), Planned(plain, 50, [], [7]), stats=stats)
    elapsed = time.perf_counter() - started
    assert stats.decode_seconds == pytest.approx(sum(token.seconds for token in tokens[1:]))
    assert 0 < stats.ttft_seconds + stats.decode_seconds <= elapsed


def test_guesses_that_a_run_leaves_out_do_not_count(model_fp32: Model, heldout: list[int]) -> None:
    """A server cuts them where answers share a run."""
    plain = [token.id for token in answer(model_fp32, heldout[:50], Sampling())]
    stats, guesser, seen = Stats(), Planned(plain, 50, [], [7]), list[int]()
    going = ask(TokenSequence(model_fp32), heldout[:50], Sampler(Sampling()), LENGTH, stats=stats, guesser=guesser)
    event = next(going, None)
    while event is not None:
        if isinstance(event, Job):
            event = going.send(compute(event if event.last else event.cut(4)))
            continue
        seen += [event.id] if isinstance(event, Token) else []
        event = next(going, None)
    assert seen == plain
    assert [guessed for guessed, _ in guesser.learnt] == [3] * 9 + [2]  # behind a known token each
    assert stats.guessed == stats.accepted == 29


@pytest.mark.parametrize("stop", range(3, 9))
def test_an_answer_ends_inside_a_guess(model_fp32: Model, heldout: list[int], stop: int) -> None:
    """By a stop token, max_tokens or the context."""
    plain = [token.id for token in answer(model_fp32, heldout[:50], Sampling())]
    limited = Planned(plain, 50, [], [MOST])
    going = steps(TokenSequence(model_fp32), heldout[:50], Sampler(Sampling()), stop, guesser=limited)
    assert [token.id for token in going if isinstance(token, Token)] == plain[:stop]

    last, stats = plain[stop], Stats()
    sequence = TokenSequence(model_fp32)
    going = steps(
        sequence, heldout[:50], Sampler(Sampling()), None, {last}, stats=stats, guesser=Planned(plain, 50, [], [MOST])
    )
    seen = [token.id for token in going if isinstance(token, Token)]
    assert seen == plain[: plain.index(last) + 1]
    assert (stats.stop, stats.tokens, sequence.ids) == ("eos", len(seen) - 1, heldout[:50] + seen[:-1])

    context = model_fp32.context
    prompt = (heldout * 3)[: context - stop]
    full = [
        token.id for token in steps(TokenSequence(model_fp32), prompt, Sampler(Sampling())) if isinstance(token, Token)
    ]
    sequence, stats = TokenSequence(model_fp32), Stats()
    going = steps(sequence, prompt, Sampler(Sampling()), stats=stats, guesser=Planned(full, len(prompt), [], [MOST]))
    assert [token.id for token in going if isinstance(token, Token)] == full
    assert (stats.stop, sequence.length) == ("context", context)


def test_a_guess_that_overflows_does_not_end_the_answer(model_fp32: Model, heldout: list[int]) -> None:
    """The embedding of a guessed token may hold a NaN, as a damaged row does."""
    plain = [token.id for token in answer(model_fp32, heldout[:50], Sampling())]
    spoilt = next(token for token in range(model_fp32.post.vocab_size) if token not in heldout[:50] + plain)
    table = model_fp32.embedding
    rows = type(table).__call__

    class Spoilt(type(table)):  # type: ignore[misc]
        def __call__(self, ids: Sequence[int]) -> object:
            out = rows(self, ids).copy()
            out[[token == spoilt for token in ids]] = np.nan
            return out

    class Wrong(Planned):
        def guess(self, ids: Sequence[int], token: int, most: int) -> Sequence[int]:
            return [*super().guess(ids, token, most)[:2], spoilt][:most]

    table.__class__ = Spoilt
    try:
        with pytest.raises(CheckFailed):
            model_fp32.forward([spoilt], 0)
        guesser = Wrong(plain, 50, [], [2])
        seen = [token.id for token in answer(model_fp32, heldout[:50], Sampling(), guesser)]
    finally:
        table.__class__ = Spoilt.__mro__[1]
    assert seen == plain
    assert guesser.learnt.count((0, 0)) == LENGTH - 4  # all but the last, too short for the spoilt token


def test_prompt_lookup_guesses_what_followed() -> None:
    lookup = PromptLookup(Costs())
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 2, 3]
    assert list(lookup.guess(text, 4, MOST)) == [5, 6, 7, 8, 9, 2, 3][: ROW_STEP - 1]
    assert list(lookup.guess([*text, 4], 5, 2)) == [6, 7]
    assert list(lookup.guess([*text, 4, 5], 0, MOST)) == []
    assert list(lookup.guess([*text, 4, 5, 0], 3, MOST)) == []


def test_prompt_lookup_takes_the_latest_place() -> None:
    text = [1, 2, 3, 4, 0, 1, 2, 3, 5, 0, 1, 2]
    assert PromptLookup(Costs()).guess(text, 3, MOST)[0] == 5


def test_wrong_guesses_become_rare_and_right_ones_long() -> None:
    costs, text = Costs(), list(range(100, 200))
    lookup = PromptLookup(costs)
    for guessed, seconds in ((0, 1.0), (7, 1.5), (7, 1.5)):
        costs.add(guessed, seconds)
    tried = []
    ids = list(text)
    for turn in range(400):  # text repeats, and what follows is never right
        token = ids[turn % 90 + 3] if len(ids) % 5 else 1000 + turn
        guess = lookup.guess(ids, token, MOST)
        ids.append(token)
        lookup.learn(len(guess), 0, 1.5 if guess else 1.0)
        tried.append(len(guess))
    assert sum(map(bool, tried)) <= 2 + LONGEST_PAUSE.bit_length()

    lookup, ids = PromptLookup(costs), text
    lengths: list[int] = []
    while len(lengths) < 5:
        guess = lookup.guess(ids, text[(len(ids)) % 100], MOST)
        ids = [*ids, text[len(ids) % 100], *guess]
        lookup.learn(len(guess), len(guess), 1.5 if guess else 1.0)
        if guess:
            lengths.append(len(guess))
    assert lengths == [7, 15, 23, 31, 31]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_grammar_follows_the_chosen_tokens_only(
    model_fp32: Model, bundle_fp32: Path, heldout: list[int], temperature: float
) -> None:
    """Its processor has a state, which guesses that are wrong must not reach."""
    bundle = Bundle.open(bundle_fp32)
    tokenizer = Tokenizer.open(bundle.hf)
    grammar = Compiler(tokenizer, bundle.vocab_size).lark('start: ("yes" | "no" | /[0-9]{2}/ | " "){40}')
    sampling, prompt = Sampling(temperature, grammar=grammar, xtc_probability=0.5), heldout[:30]
    plain = [token.id for token in answer(model_fp32, prompt, sampling)]
    guesser = Planned(plain, len(prompt), range(1, LENGTH, 4), [7, 3])
    assert [token.id for token in answer(model_fp32, prompt, sampling, guesser)] == plain
    assert 0 < sum(right for _, right in guesser.learnt) < sum(count for count, _ in guesser.learnt)
    assert re.fullmatch(r"(yes|no|[0-9]{2}|y(es?)?|n|[0-9]| )*", tokenizer.decode(plain))


def test_only_an_exact_engine_guesses(model_fp32: Model) -> None:
    assert (Speculation().guesser(TokenSequence(model_fp32)) is not None) == model_fp32.decoder.exact

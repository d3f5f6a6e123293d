"""Generation compared with transformers: greedy tokens for short and long prompts, and stop conditions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from axrun.errors import BadInput
from axrun.generate import Prefilled, Stats, Token, forced, generate, steps
from axrun.model import Model
from axrun.sampling import Sampling
from axrun.sampling.sampler import Sampler
from axrun.sequence import Sequence, common_prefix


def greedy(reference: Any, ids: list[int], count: int, **options: Any) -> list[int]:
    given = torch.tensor([ids])
    out = reference.generate(
        given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=count, pad_token_id=0, **options
    )
    return [int(token) for token in out[0, len(ids) :]]


@pytest.mark.parametrize("length", [1, 20, 33, 100, 170])
def test_greedy_tokens_match_transformers(model_fp32: Model, reference: Any, heldout: list[int], length: int) -> None:
    """100 and 170 exceed a prefill chunk; 170 also exceeds the history of all prefill groups."""
    stop = set(reference.generation_config.eos_token_id)
    expected = greedy(reference, heldout[:length], 30)
    seen = [token.id for token in generate(Sequence(model_fp32), heldout[:length], Sampling(), 30, stop)]
    assert seen == [token for token in expected if token not in stop]


def test_the_repetition_penalty_matches_transformers(model_fp32: Model, reference: Any, heldout: list[int]) -> None:
    expected = greedy(reference, heldout[:40], 25, repetition_penalty=4.0, eos_token_id=None)
    seen = [token.id for token in generate(Sequence(model_fp32), heldout[:40], Sampling(repetition_penalty=4.0), 25)]
    assert seen == expected != greedy(reference, heldout[:40], 25, eos_token_id=None)


def test_a_seed_repeats_an_answer(model_fp32: Model, heldout: list[int]) -> None:
    answers = []
    for seed in (1, 1, 2):
        sampling = Sampling(1.5, top_p=0.95)
        answers.append([token.id for token in generate(Sequence(model_fp32), heldout[:30], sampling, 30, seed=seed)])
    assert answers[0] == answers[1] != answers[2]


def test_it_stops_at_the_stop_token_max_tokens_or_the_context(model_fp32: Model, heldout: list[int]) -> None:
    stats = Stats()
    free = [token.id for token in generate(Sequence(model_fp32), heldout[:250], Sampling(), stats=stats)]
    # the answer fills the cache; its last token needs no row
    assert (stats.stop, len(free), model_fp32.length) == ("context", 6, 255)

    stats = Stats()
    assert [token.id for token in generate(Sequence(model_fp32), heldout[:250], Sampling(), 2, stats=stats)] == free[:2]
    assert (stats.stop, stats.tokens, stats.steps) == ("length", 2, 1)

    stats, last = Stats(), free[3]
    seen = [token.id for token in generate(Sequence(model_fp32), heldout[:250], Sampling(), None, {last}, stats=stats)]
    assert seen == free[: free.index(last)]
    assert stats.stop == "eos"


def test_the_first_token_may_be_the_last(model_fp32: Model, heldout: list[int]) -> None:
    first = next(generate(Sequence(model_fp32), heldout[:10], Sampling())).id
    stats = Stats()
    assert list(generate(Sequence(model_fp32), heldout[:10], Sampling(), None, {first}, stats=stats)) == []
    assert (stats.stop, stats.tokens, stats.steps, stats.decode_rate) == ("eos", 0, 0, 0.0)


def test_stats_separate_prefill_and_decode(model_fp32: Model, heldout: list[int]) -> None:
    stats = Stats()
    tokens = list(generate(Sequence(model_fp32), heldout[:50], Sampling(), 8, stats=stats))
    assert (stats.prompt_tokens, stats.tokens, stats.steps) == (50, 8, 7)
    assert tokens[0].seconds == stats.ttft_seconds > 0
    assert sum(token.seconds for token in tokens[1:]) == pytest.approx(stats.decode_seconds)
    assert stats.decode_rate == pytest.approx(7 / stats.decode_seconds)
    assert stats.prefill_rate == pytest.approx(50 / stats.ttft_seconds)


def test_a_conversation_continues_from_the_cache(model_fp32: Model, reference: Any, heldout: list[int]) -> None:
    sequence, stats = Sequence(model_fp32), Stats()
    list(generate(sequence, heldout[:60], Sampling(), 1))
    assert sequence.ids == heldout[:60]
    seen = [token.id for token in generate(sequence, heldout[:90], Sampling(), 10, stats=stats)]
    assert seen == greedy(reference, heldout[:90], 10, eos_token_id=None)
    assert (stats.reused, stats.prompt_tokens) == (60, 30)
    assert sequence.ids == heldout[:90] + seen[:-1]


def test_steps_yield_chunks_raw_logits_and_the_stop_token(model_fp32: Model, heldout: list[int]) -> None:
    """The server needs single engine runs, and logits before any processor."""
    plain = Model.forward(model_fp32, heldout[:70]).copy()
    best = int(plain.argmax())
    sampler = Sampler(Sampling(logit_bias={best: -100.0, 5: 1000.0}))
    going = list(steps(Sequence(model_fp32), heldout[:70], sampler, 4, {5}))
    assert [step.done for step in going if isinstance(step, Prefilled)] == [32, 64, 70] or len(going) == 2
    last = going[-1]
    assert isinstance(last, Token)
    assert (last.id, last.stop) == (5, "eos")
    np.testing.assert_allclose(last.logits, plain, rtol=0, atol=1e-4)


def test_max_tokens_0_samples_nothing(model_fp32: Model, heldout: list[int]) -> None:
    stats, sequence = Stats(), Sequence(model_fp32)
    assert list(generate(sequence, heldout[:40], Sampling(), 0, stats=stats)) == []
    assert (stats.stop, sequence.length) == ("length", 40)


def test_forced_tokens_give_the_logits_of_a_text(
    model_fp32: Model, heldout: list[int], heldout_logits: NDArray[np.float32]
) -> None:
    going = steps(Sequence(model_fp32), heldout[:50], forced(heldout[50:60]), 11)
    rows = np.stack([step.logits.copy() for step in going if isinstance(step, Token)])
    np.testing.assert_allclose(rows, heldout_logits[49:60], rtol=0, atol=1e-4)


def test_an_abandoned_generation_leaves_the_sequence_consistent(model_fp32: Model, heldout: list[int]) -> None:
    sequence = Sequence(model_fp32)
    for number, _ in enumerate(steps(sequence, heldout[:200], Sampler(Sampling()))):
        if number == 1:
            break
    assert 0 < sequence.length == model_fp32.length < 200
    seen = [token.id for token in generate(sequence, heldout[:200], Sampling(), 5)]
    assert seen == [token.id for token in generate(Sequence(model_fp32), heldout[:200], Sampling(), 5)]


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), max_size=40), st.integers(0, 40))
def test_common_prefix(one: list[int], other: list[int], shared: int) -> None:
    other = one[:shared] + other
    expected = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    assert common_prefix(one, other) == common_prefix(tuple(other), one) == expected


def test_a_prompt_longer_than_the_context_is_refused(model_fp32: Model) -> None:
    with pytest.raises(BadInput, match="256 tokens do not fit the context of 255"):
        next(generate(Sequence(model_fp32), [1] * 256, Sampling()))
    with pytest.raises(BadInput, match="the prompt is empty"):
        next(generate(Sequence(model_fp32), [], Sampling()))

"""Generation against transformers' own: greedy tokens for short and long prompts, and what ends it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from axrun.errors import BadInput
from axrun.generate import Stats, generate
from axrun.model import Model
from axrun.sampling import Sampling


def greedy(reference: Any, ids: list[int], count: int, **options: Any) -> list[int]:
    given = torch.tensor([ids])
    out = reference.generate(
        given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=count, pad_token_id=0, **options
    )
    return [int(token) for token in out[0, len(ids) :]]


@pytest.mark.parametrize("length", [1, 20, 33, 100, 170])
def test_greedy_tokens_are_those_of_transformers(
    model_fp32: Model, reference: Any, heldout: list[int], length: int
) -> None:
    """100 and 170 are longer than a prefill chunk; 170 also longer than any prefill group's history."""
    stop = set(reference.generation_config.eos_token_id)
    expected = greedy(reference, heldout[:length], 30)
    seen = [token.id for token in generate(model_fp32, heldout[:length], Sampling(), 30, stop)]
    assert seen == [token for token in expected if token not in stop]


def test_the_repetition_penalty_is_that_of_transformers(model_fp32: Model, reference: Any, heldout: list[int]) -> None:
    expected = greedy(reference, heldout[:40], 25, repetition_penalty=4.0, eos_token_id=None)
    seen = [token.id for token in generate(model_fp32, heldout[:40], Sampling(repetition_penalty=4.0), 25)]
    assert seen == expected != greedy(reference, heldout[:40], 25, eos_token_id=None)


def test_a_seed_repeats_an_answer(model_fp32: Model, heldout: list[int]) -> None:
    answers = []
    for seed in (1, 1, 2):
        model_fp32.decoder.cache.reset()
        sampling = Sampling(1.5, top_p=0.95)
        answers.append([token.id for token in generate(model_fp32, heldout[:30], sampling, 30, seed=seed)])
    assert answers[0] == answers[1] != answers[2]


def test_it_ends_with_the_stop_token_or_max_tokens_or_the_context(model_fp32: Model, heldout: list[int]) -> None:
    stats = Stats()
    free = [token.id for token in generate(model_fp32, heldout[:250], Sampling(), stats=stats)]
    # the answer fills the cache, and one more token needs no room in it
    assert (stats.stop, len(free), model_fp32.length) == ("context", 6, 255)

    model_fp32.decoder.cache.reset()
    stats = Stats()
    assert [token.id for token in generate(model_fp32, heldout[:250], Sampling(), 2, stats=stats)] == free[:2]
    assert (stats.stop, stats.tokens, stats.steps) == ("length", 2, 1)

    model_fp32.decoder.cache.reset()
    stats, last = Stats(), free[3]
    seen = [token.id for token in generate(model_fp32, heldout[:250], Sampling(), None, {last}, stats=stats)]
    assert seen == free[: free.index(last)]
    assert stats.stop == "eos"


def test_the_first_token_may_be_the_last(model_fp32: Model, heldout: list[int]) -> None:
    first = next(generate(model_fp32, heldout[:10], Sampling())).id
    model_fp32.decoder.cache.reset()
    stats = Stats()
    assert list(generate(model_fp32, heldout[:10], Sampling(), None, {first}, stats=stats)) == []
    assert (stats.stop, stats.tokens, stats.steps, stats.decode_rate) == ("eos", 0, 0, 0.0)


def test_stats_tell_prefill_from_decode(model_fp32: Model, heldout: list[int]) -> None:
    stats = Stats()
    tokens = list(generate(model_fp32, heldout[:50], Sampling(), 8, stats=stats))
    assert (stats.prompt_tokens, stats.tokens, stats.steps) == (50, 8, 7)
    assert tokens[0].seconds == stats.ttft_seconds > 0
    assert sum(token.seconds for token in tokens[1:]) == pytest.approx(stats.decode_seconds)
    assert stats.decode_rate == pytest.approx(7 / stats.decode_seconds)
    assert stats.prefill_rate == pytest.approx(50 / stats.ttft_seconds)


def test_a_conversation_goes_on_where_it_was(model_fp32: Model, reference: Any, heldout: list[int]) -> None:
    list(generate(model_fp32, heldout[:60], Sampling(), 1))
    assert model_fp32.length == 60
    seen = [token.id for token in generate(model_fp32, heldout[60:90], Sampling(), 10)]
    assert seen == greedy(reference, heldout[:90], 10, eos_token_id=None)


def test_a_prompt_longer_than_the_context_is_refused(model_fp32: Model) -> None:
    with pytest.raises(BadInput, match="256 tokens do not fit the context of 255"):
        next(generate(model_fp32, [1] * 256, Sampling()))
    with pytest.raises(BadInput, match="the prompt is empty"):
        next(generate(model_fp32, [], Sampling()))

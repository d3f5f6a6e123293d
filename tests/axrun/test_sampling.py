"""Sampling compared with transformers' logits processors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from axrun.errors import BadInput, CheckFailed
from axrun.sampling import Sampling
from axrun.sampling.draw import draw, weights
from axrun.sampling.sampler import Sampler
from axrun.serve import schema

OFF = {
    "enable_temperature": False,
    "temperature": 0.9,
    "enable_repetition_penalty": False,
    "repetition_penalty": 1.2,
    "penalty_window": 20,
    "enable_top_p_sampling": False,
    "top_p": 0.8,
    "enable_top_k_sampling": False,
    "top_k": 10,
}


def logits_of(seed: int, vocab: int, spread: float = 4.0) -> NDArray[np.float32]:
    """Random logits without ties."""
    random = np.random.default_rng(seed)
    return random.permutation(np.linspace(-spread, spread, vocab)).astype(np.float32)


def transformers_probabilities(logits: NDArray[np.float32], past: list[int], sampling: Sampling) -> NDArray[np.float64]:
    processors: Any = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    window = len(past) if sampling.penalty_window is None else sampling.penalty_window
    recent = past[len(past) - min(window, len(past)) :]
    scores = processors(torch.tensor([recent], dtype=torch.long), torch.tensor(logits[None].copy()))
    return np.asarray(torch.softmax(scores.double(), dim=-1)[0].numpy())


def probabilities(logits: NDArray[np.float32], past: list[int], sampling: Sampling) -> NDArray[np.float64]:
    """Our probabilities."""
    kept = Sampler(sampling).weights(logits, past).astype(np.float64)
    return np.asarray(kept / kept.sum())


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 1000),
    vocab=st.sampled_from([3, 50, 3000]),
    temperature=st.floats(0.1, 3),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.99)),
    top_k=st.integers(0, 60),
    penalty=st.sampled_from([0.7, 1.0, 1.3]),
    window=st.one_of(st.none(), st.integers(0, 8)),
    past=st.lists(st.integers(0, 2), max_size=12),
)
def test_distributions_match_transformers(
    seed: int,
    vocab: int,
    temperature: float,
    top_p: float,
    top_k: int,
    penalty: float,
    window: int | None,
    past: list[int],
) -> None:
    sampling = Sampling(temperature, penalty, window, top_p, top_k)
    logits = logits_of(seed, vocab)
    expected = transformers_probabilities(logits, past, sampling)
    seen = probabilities(logits, past, sampling)
    # a token at the exact boundary of top_p may be kept or not
    different = np.flatnonzero((seen > 0) != (expected > 0))
    assert len(different) <= 1
    if not len(different):
        np.testing.assert_allclose(seen, expected, rtol=1e-4, atol=1e-9)


def test_a_wide_vocabulary_keeps_every_token_of_the_nucleus() -> None:
    """Flat logits: the nucleus exceeds the first set of candidates."""
    logits = logits_of(0, 100_000, spread=0.01)
    for sampling in (Sampling(1.0, top_p=0.9), Sampling(1.0, top_k=70_000)):
        seen, expected = probabilities(logits, [], sampling), transformers_probabilities(logits, [], sampling)
        assert abs(np.count_nonzero(seen) - np.count_nonzero(expected)) <= 1


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 1000),
    vocab=st.sampled_from([1, 2, 511, 512, 513, 2000]),
    levels=st.sampled_from([1, 2, 30, 100_000]),
    spread=st.sampled_from([0.0, 0.001, 1.0, 8.0, 200.0]),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]),
    top_k=st.sampled_from([0, 1, 2, 40, 600, 2000]),
)
def test_cutting_matches_a_full_sort(
    seed: int, vocab: int, levels: int, spread: float, top_p: float, top_k: int
) -> None:
    """Also with many ties, where lower ids are kept."""
    random = np.random.default_rng(seed)
    logits = (spread * random.integers(0, levels, vocab) / levels).astype(np.float32)
    kept = weights(logits, Sampling(1.0, top_p=top_p, top_k=top_k))
    plain = weights(logits, Sampling(1.0))
    order = np.argsort(-plain, kind="stable")[: top_k or None]
    mass = np.cumsum(plain[order].astype(np.float64))
    count = len(order) if top_p == 1 else 1 + np.count_nonzero(mass[:-1] < top_p * mass[-1])
    assert abs(np.count_nonzero(kept) - np.count_nonzero(plain[order[:count]])) <= 1  # sums may round differently
    assert set(np.flatnonzero(kept)) ^ set(np.flatnonzero(plain)) <= set(order[count - 1 :]) | set(
        np.argsort(-plain, kind="stable")[len(order) :]
    )
    np.testing.assert_array_equal(kept[kept > 0], plain[kept > 0])


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 1000),
    vocab=st.sampled_from([1, 5, 512, 513, 3000]),
    share=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    chance=st.one_of(st.floats(0, 1, exclude_max=True), st.just(1 - 2**-53)),
)
def test_draw_inverts_the_cumulative_distribution(seed: int, vocab: int, share: float, chance: float) -> None:
    random = np.random.default_rng(seed)
    kept = random.random(vocab, np.float32) * (random.random(vocab) < share)
    kept[random.integers(vocab)] = 1.0
    token, sums = draw(kept, chance), np.cumsum(kept.astype(np.float64))
    assert kept[token] > 0
    assert sums[token] - kept[token] <= chance * sums[-1] + 1e-6
    assert chance * sums[-1] <= sums[token] + 1e-6


def test_the_default_is_greedy_and_keeps_the_logits() -> None:
    logits = logits_of(3, 200)
    before = logits.copy()
    assert Sampler(Sampling())(logits) == logits.argmax()
    best, second = np.argsort(-logits)[:2]
    assert Sampler(Sampling(repetition_penalty=100.0))(logits, [int(best)]) == second
    np.testing.assert_array_equal(logits, before)


def test_a_seed_determines_the_draws() -> None:
    logits, sampling = logits_of(4, 500, spread=1), Sampling(1.0, top_p=0.95, top_k=100)
    draws = [[sampler(logits) for _ in range(40)] for sampler in (Sampler(sampling, seed) for seed in (7, 7, 8))]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(1.0, top_k=3), Sampling(0.7, top_p=0.8)])
def test_draws_follow_the_distribution(sampling: Sampling) -> None:
    logits = np.array([1.0, 0.0, 2.0, -1.0, 1.5], np.float32)
    sampler = Sampler(sampling, seed=0)
    counts = np.bincount([sampler(logits) for _ in range(20_000)], minlength=5) / 20_000
    np.testing.assert_allclose(counts, transformers_probabilities(logits, [], sampling), atol=0.015)


@pytest.mark.parametrize(
    ("on", "expected"),
    [
        ([], Sampling(penalty_window=20)),
        (["temperature"], Sampling(penalty_window=20)),  # neither top_p nor top_k: greedy
        (["top_k_sampling"], Sampling(1.0, top_k=10, penalty_window=20)),
        (["temperature", "top_k_sampling"], Sampling(0.9, top_k=10, penalty_window=20)),
        (["temperature", "top_p_sampling"], Sampling(0.9, top_p=0.8, penalty_window=20)),
        (["top_p_sampling", "top_k_sampling"], Sampling(1.0, top_p=0.8, penalty_window=20)),  # top_p takes precedence
        (["repetition_penalty"], Sampling(repetition_penalty=1.2, penalty_window=20)),
    ],
)
def test_post_config_has_the_vendors_meaning(on: list[str], expected: Sampling) -> None:
    assert Sampling.from_post_config({**OFF, **{f"enable_{key}": True for key in on}}) == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"top_q": 1}, r"unknown keys \['top_q'\]"),
        ({"top_p": None}, r"top_p is None, expected a number above 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": "1"}, "temperature is '1'"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"penalty_window": -5}, "penalty_window is -5"),
        ({"enable_temperature": 1}, "enable_temperature is 1, expected true or false"),
    ],
)
def test_an_invalid_post_config_is_reported(change: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        Sampling.from_post_config({**OFF, **change})


def test_a_missing_key_is_reported() -> None:
    with pytest.raises(BadInput, match=r"lacks \['top_k'\]"):
        Sampling.from_post_config({key: value for key, value in OFF.items() if key != "top_k"})


def test_overrides_replace_values() -> None:
    greedy = Sampling()
    assert greedy.override(temperature=None, top_p=None) == greedy
    assert greedy.override(top_p=0.9) == Sampling(1.0, top_p=0.9)
    assert greedy.override(top_k=5, temperature=0.5) == Sampling(0.5, top_k=5)
    assert greedy.override(repetition_penalty=1.1) == Sampling(repetition_penalty=1.1)
    assert Sampling(1.0, top_k=5).override(temperature=0.0).temperature == 0
    with pytest.raises(BadInput, match=r"top_k is 1\.5"):
        greedy.override(top_k=1.5)


@pytest.mark.parametrize("asked", [{"temperature": 2.5}, {"presence_penalty": -3.0}, {"frequency_penalty": 2.1}])
def test_users_have_the_bounds_of_the_server(asked: dict[str, float]) -> None:
    ((name, value),) = asked.items()
    bounds = schema.COMMON[name]
    assert not bounds["minimum"] <= value <= bounds["maximum"]
    with pytest.raises(BadInput, match=rf"{name} is {value}, expected .*2"):
        Sampling().override(**asked)
    for limit in (bounds["minimum"], bounds["maximum"]):
        assert getattr(Sampling().override(**{name: limit}), name) == limit


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_p=0.5)])
def test_logits_that_are_not_finite_are_an_error(value: float, sampling: Sampling) -> None:
    logits = logits_of(0, 50)
    logits[17] = value
    with pytest.raises(CheckFailed, match="the model returned a logit of"):
        Sampler(sampling)(logits)

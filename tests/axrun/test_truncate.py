"""Typical sampling compared with transformers; top-n-sigma, XTC and DRY with their definitions, token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import TypicalLogitsWarper

from axrun.errors import BadInput
from axrun.sampling import Sampling
from axrun.sampling.dry import LONGEST, Dry
from axrun.sampling.processors import Suppress
from axrun.sampling.sampler import Sampler
from axrun.sampling.truncate import TopNSigma, Typical, Xtc

VOCAB = 50
Floats = NDArray[np.float32]


def logits_of(seed: int, vocab: int = VOCAB) -> Floats:
    return np.random.default_rng(seed).normal(0, 2, vocab).astype(np.float32)


def kept(process: Any, logits: Floats) -> set[int]:
    out = logits.copy()
    process(out, [], 0)
    left = np.flatnonzero(np.isfinite(out))
    assert np.array_equal(out[left], logits[left])
    return {int(token) for token in left}


@given(st.integers(0, 10_000), st.floats(0.05, 0.999))
def test_typical_matches_transformers(seed: int, mass: float) -> None:
    logits = logits_of(seed)
    reference: Any = TypicalLogitsWarper(mass=mass)
    expected = reference(torch.zeros((1, 1), dtype=torch.long), torch.tensor(logits[None].copy()))[0].numpy()
    assert kept(Typical(mass), logits) == {int(token) for token in np.flatnonzero(np.isfinite(expected))}


@given(st.integers(0, 10_000), st.floats(0.1, 3))
def test_top_n_sigma_is_a_distance_from_the_largest_logit(seed: int, n: float) -> None:
    logits = logits_of(seed)
    values = [float(logit) for logit in logits]
    mean = sum(values) / VOCAB
    sigma = (sum((value - mean) ** 2 for value in values) / VOCAB) ** 0.5
    for token in kept(TopNSigma(n), logits) ^ {i for i in range(VOCAB) if values[i] >= max(values) - n * sigma}:
        assert values[token] == pytest.approx(max(values) - n * sigma, abs=1e-4)


@given(st.integers(0, 10_000), st.floats(0.01, 0.5))
def test_xtc_excludes_all_top_choices_but_the_last(seed: int, threshold: float) -> None:
    logits = logits_of(seed)
    shares = torch.softmax(torch.tensor(logits).double(), 0).numpy()
    top = sorted((i for i in range(VOCAB) if shares[i] >= threshold), key=lambda i: -shares[i])
    assert kept(Xtc(1.0, threshold, np.random.default_rng(0)), logits) == set(range(VOCAB)) - set(top[:-1])
    assert kept(Xtc(0.0, threshold, np.random.default_rng(0)), logits) == set(range(VOCAB))


def test_xtc_happens_with_its_probability() -> None:
    logits = np.array([3, 2.9, 0, 0], np.float32)
    xtc = Xtc(0.3, 0.1, np.random.default_rng(1))
    seen = sum(0 not in kept(xtc, logits) for _ in range(1000))
    assert 250 < seen < 350


@given(st.lists(st.integers(0, 3), max_size=40), st.sets(st.integers(0, 3), max_size=1), st.integers(1, 4))
def test_dry_lowers_what_would_continue_a_repetition(ids: list[int], breakers: set[int], allowed: int) -> None:
    expected = np.zeros(4, np.float64)
    for token in range(4):
        longest = 0
        for place in range(1, len(ids)):
            length = 0
            while (
                ids[place] == token
                and length < place
                and ids[place - 1 - length] == ids[len(ids) - 1 - length]
                and ids[place - 1 - length] not in breakers
            ):
                length += 1
            longest = max(longest, length)
        if longest >= allowed and longest:
            expected[token] = -0.8 * 1.5 ** (longest - allowed)
    logits = np.zeros(4, np.float32)
    Dry(0.8, 1.5, allowed, breakers)(logits, ids, 0)
    np.testing.assert_allclose(logits, expected, rtol=1e-5)


def test_dry_looks_back_as_far_as_its_window() -> None:
    ids = [7, 8, 9, 1, 2, 3, 4, 7, 8]
    for window, seen in ((None, True), (9, True), (5, False)):
        logits = np.zeros(10, np.float32)
        Dry(1, 2, 2, (), window)(logits, ids, 0)
        assert (logits[9] < 0) == seen
    logits = np.zeros(2, np.float32)
    Dry(1, 4, 1, ())(logits, [1] * 5000, 0)
    assert np.isfinite(logits).all()
    assert logits[1] < -(4.0 ** (LONGEST - 2))


OFTEN = Sampling(1.0, suppress=(0,), top_n_sigma=0.01, typical_p=0.01, xtc_probability=1.0, xtc_threshold=0.01)


def test_what_is_excluded_before_counts_as_absent() -> None:
    """The only likely token is suppressed; the others are still sampled, e.g. by a grammar."""
    logits = np.full(VOCAB, -20, np.float32)
    logits[0], logits[5] = 20, -10
    assert Sampler(OFTEN, 1)(logits) == 5
    only = np.zeros(VOCAB, np.float32)
    Suppress(range(1, VOCAB))(only, [], 0)
    for process in (TopNSigma(0.5), Typical(0.1), Xtc(1.0, 0.01, np.random.default_rng(0))):
        assert kept(process, only) == {0}


def test_greedy_decoding_ignores_what_only_cuts_off() -> None:
    logits = logits_of(3)
    greedy = Sampling(top_n_sigma=1, typical_p=0.1, xtc_probability=1.0, xtc_threshold=0.001)
    assert Sampler(greedy)(logits) == int(logits.argmax())


@pytest.mark.parametrize("name", ["top_n_sigma", "typical_p", "xtc_probability"])
def test_they_turn_greedy_decoding_into_sampling(name: str) -> None:
    assert Sampling().override(**{name: 0.5}).temperature == 1.0
    assert Sampling().override(dry_multiplier=0.8).temperature == 0.0
    with pytest.raises(BadInput, match=f"{name} is -1"):
        Sampling().override(**{name: -1})


def test_a_seed_still_repeats_an_answer() -> None:
    sampling = Sampling(1.0, xtc_probability=0.5, xtc_threshold=0.02)
    one, two = (Sampler(sampling, 7) for _ in range(2))
    assert [one(logits_of(seed)) for seed in range(50)] == [two(logits_of(seed)) for seed in range(50)]

"""The accuracy of bundles of the shipped model, compared with transformers in float32 on held-out text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from axrun.agreement import divergence
from axrun.format.bundle import Bundle
from axrun.generate import generate
from axrun.model import Model
from axrun.sampling import Sampling
from axrun.sequence import Sequence
from axrun.text.template import ChatTemplate, prompt_ids
from axrun.text.tokenizer import Tokenizer
from tests.conftest import Builder

Floats = NDArray[np.float32]
WINDOW = 250  # tokens seen at a time: within the bundles' context, and longer than every prefill group alone


@pytest.fixture(scope="module")
def windows(tiny_qwen2: Path) -> list[list[int]]:
    """The held-out text in windows of token ids."""
    tokenizer = Tokenizer.find(tiny_qwen2)
    assert tokenizer
    ids = tokenizer.encode((tiny_qwen2 / "heldout.txt").read_text("utf-8"))
    return [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW, WINDOW)]


@pytest.fixture(scope="module")
def reference(tiny_qwen2: Path, windows: list[list[int]]) -> list[Floats]:
    """transformers' logits for each window, float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [model(torch.tensor([ids])).logits[0].numpy() for ids in windows]


def logits(bundle: Path, windows: list[list[int]]) -> list[Floats]:
    model = Model.load(Bundle.open(bundle))
    return [model.forward(ids, 0, logits="all") for ids in windows]


def agreement(ours: list[Floats], reference: list[Floats]) -> tuple[float, float]:
    """(top-1 agreement, mean KL divergence) over all positions."""
    a, b = np.concatenate(ours), np.concatenate(reference)
    return float((a.argmax(axis=1) == b.argmax(axis=1)).mean()), float(divergence(b, a).mean())


def test_float32_is_the_reference(bundle_fp32: Path, windows: list[list[int]], reference: list[Floats]) -> None:
    ours = logits(bundle_fp32, windows)
    assert len(windows) >= 10
    for mine, theirs in zip(ours, reference, strict=True):
        assert np.abs(mine - theirs).max() <= 1e-4


def test_s8_keeps_the_top_choice(
    bundle_s8: Path, windows: list[list[int]], reference: list[Floats], record_property: Callable[[str, object], None]
) -> None:
    top1, kld = agreement(logits(bundle_s8, windows), reference)
    record_property("top1_agreement", top1)
    record_property("mean_kld", kld)
    assert top1 >= 0.99
    assert kld <= 5e-3


@pytest.mark.parametrize(("weight_type", "least_top1", "most_kld"), [("bf16", 0.99, 2e-3), ("s4", 0.80, 0.5)])
def test_other_weight_types(
    weight_type: str,
    least_top1: float,
    most_kld: float,
    build_tiny: Builder,
    windows: list[list[int]],
    reference: list[Floats],
) -> None:
    bundle = build_tiny(weight_type=weight_type, post_weight_type="bf16")
    top1, kld = agreement(logits(bundle, windows), reference)
    assert top1 >= least_top1
    assert kld <= most_kld


def test_a_prompt_longer_than_prefill_len_matches_the_reference(tiny_qwen2: Path, bundle_fp32: Path) -> None:
    """The limit of the vendor's runner: three prefill groups and decode, with the same greedy tokens."""
    bundle = Bundle.open(bundle_fp32)
    tokenizer = Tokenizer.find(bundle.hf)
    assert tokenizer
    ids = tokenizer.encode((tiny_qwen2 / "heldout.txt").read_text("utf-8"))[:150]
    assert len(ids) > 4 * bundle.prefill_len
    ours = [token.id for token in generate(Sequence(Model.load(bundle)), ids, Sampling(), 40)]
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.float32).eval()
    theirs = model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False, eos_token_id=None)
    assert ours == theirs[0, len(ids) :].tolist()


@pytest.mark.parametrize("question", ["1+1=", "99+99=", "what is 17+25?"])
def test_the_default_bundle_adds(question: str, bundle_s8: Path) -> None:
    bundle = Bundle.open(bundle_s8)
    tokenizer = Tokenizer.find(bundle.hf)
    assert tokenizer
    ids = prompt_ids(tokenizer, ChatTemplate.find(bundle.hf), question)
    answer = tokenizer.decode(
        token.id for token in generate(Sequence(Model.load(bundle)), ids, Sampling(), 8, tokenizer.stop_ids)
    )
    numbers = [int(part) for part in question.replace("what is ", "").rstrip("=?").split("+")]
    assert answer.strip() == str(sum(numbers))

"""Windows, and architectures that compute as Llama does where their config.json says so: transformers' logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from axrun.errors import BadInput
from tests.axc.as_transformers import (
    AS_ITSELF,
    AUTO,
    IDS,
    KIN,
    change_config,
    copy_of,
    ours,
    plan,
    same,
    theirs,
)

# Windows


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1, "layer_types": None}),
        ("llama", {"sliding_window": 24}),
        ("mistral", {"sliding_window": 24}),
        ("mistral", {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}),
    ],
)
def test_a_context_ends_with_the_window(models: Any, kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    folder = copy_of(models, kind, tmp_path / "hf", changes)
    options: dict[str, Any] = {} if kind in AS_ITSELF else {"model_type": "llama"}
    with pytest.raises(BadInput, match=r"expected 1 to 23: the model sees 24 positions, its sliding_window"):
        plan(folder, tmp_path / "out", kv_cache_len=24, **options)
    got = ours(folder, tmp_path / "out", IDS[:23], kv_cache_len=23, prefill_len=8, **options)
    assert same(got, theirs(folder, IDS[:23]))
    if kind != "llama":  # whose prefill sees everything and whose cache does not
        assert not same(theirs(folder), models[kind][1])


def test_transformers_cache_slides_for_a_llama_with_a_window(models: Any, tmp_path: Path) -> None:
    """Why a Llama's sliding_window, which its layers do not read, bounds the context."""
    folder = copy_of(models, "llama", tmp_path / "hf", {"sliding_window": 24})
    model = AUTO.from_pretrained(folder, dtype=torch.float32).eval()
    cache, rows = None, []
    with torch.inference_mode():
        for token in IDS:
            step = model(torch.tensor([[int(token)]]), past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            rows.append(step.logits[0, -1].numpy())
    plain = models["llama"][1]
    assert same(np.array(rows)[:24], plain[:24])
    assert not same(np.array(rows), plain)


# Kin


@pytest.mark.parametrize("kind", KIN)
def test_kin_that_compute_as_llama_does(models: Any, kind: str, tmp_path: Path) -> None:
    folder, logits = models[kind]
    with pytest.raises(BadInput, match="This one computes as llama does: pass --model_type llama"):
        plan(folder, tmp_path / "out")
    assert same(ours(folder, tmp_path / "out", model_type="llama"), logits)
    assert plan(folder, tmp_path / "out", model_type="llama").notices == ()


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers is [1, 0]"),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 2}, "no_rope_layers is [1, 0]"),
        ("granite", {"attention_multiplier": 1.0}, "attention_multiplier is 1; Llama's is 0.25"),
        ("granite", {"embedding_multiplier": 12.0}, "embedding_multiplier is 12"),
        ("granite", {"residual_multiplier": 0.22}, "residual_multiplier is 0.22"),
        ("granite", {"logits_scaling": 8.0}, "logits_scaling is 8"),
    ],
)
def test_kin_that_compute_otherwise(models: Any, kind: str, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = copy_of(models, kind, tmp_path / "hf", changes)
    assert not same(theirs(folder), models[kind][1])
    for options in ({}, {"model_type": "llama"}):
        with pytest.raises(BadInput) as refused:
            plan(folder, tmp_path / "out", **options)
        assert said in str(refused.value)
        assert "pass --model_type" not in str(refused.value)


def test_granite_multipliers_that_are_absent_are_granite_s(models: Any, tmp_path: Path) -> None:
    folder = copy_of(models, "granite", tmp_path / "hf", {})
    change_config(folder, {}, without=("attention_multiplier",))
    assert not same(theirs(folder), models["granite"][1])
    with pytest.raises(BadInput, match="attention_multiplier is 1"):
        plan(folder, tmp_path / "out", model_type="llama")


def test_the_hint_names_the_window(models: Any, tmp_path: Path) -> None:
    folder = copy_of(models, "mistral", tmp_path / "hf", {"sliding_window": 24})
    with pytest.raises(BadInput, match=r"pass --model_type llama and a --kv_cache_len below its sliding_window 24"):
        plan(folder, tmp_path / "out")
    change_config(folder, {}, without=("sliding_window",))
    with pytest.raises(BadInput, match=r"below its sliding_window 4096"):
        plan(folder, tmp_path / "out")

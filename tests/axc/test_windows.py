"""Windows that bound a context, and those that do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from axrun.errors import BadInput
from tests.axc.as_transformers import AUTO, IDS, copy_of, ours, plan, same, theirs


def test_a_llama_s_context_ends_with_the_window(models: Any, tmp_path: Path) -> None:
    folder = copy_of(models, "llama", tmp_path / "hf", {"sliding_window": 24})
    with pytest.raises(BadInput, match=r"expected 1 to 23: the model has 24 positions, its sliding_window"):
        plan(folder, tmp_path / "out", kv_cache_len=24)
    got = ours(folder, tmp_path / "out", IDS[:23], kv_cache_len=23, prefill_len=8)
    assert same(got, theirs(folder, IDS[:23]))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1, "layer_types": None}),
        ("mistral", {"sliding_window": 24}),
        ("mistral", {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}),
    ],
)
def test_a_context_goes_past_the_window_of_a_layer(
    models: Any, kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    folder = copy_of(models, kind, tmp_path / "hf", changes)
    assert same(ours(folder, tmp_path / "out"), theirs(folder))
    assert not same(theirs(folder), models[kind][1])


def test_transformers_cache_slides_for_a_llama_with_a_window(models: Any, tmp_path: Path) -> None:
    """The reason why a Llama's sliding_window, which its layers ignore, bounds the context."""
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

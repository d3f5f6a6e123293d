"""Synthetic checkpoints: real shapes, the same bytes from the same seed, and readable by the original libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from axc import shapes, synth

SMALL: dict[str, Any] = {
    **shapes.config_json("qwen2-0.5b"),
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}


def test_transformers_loads_it(tmp_path: Path) -> None:
    synth.synth("qwen2-0.5b", tmp_path / "a", config=SMALL)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
    assert 0.015 < float(model.model.layers[0].mlp.up_proj.weight.detach().std()) < 0.025


def test_the_seed_determines_every_byte(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        synth.synth("qwen2-0.5b", tmp_path / name, seed, config=SMALL)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synth, "SHARD_BYTES", 200_000)
    synth.synth("qwen2-0.5b", tmp_path / "a", config=SMALL)
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    for tensor, shard in index.items():
        with safe_open(tmp_path / "a" / shard, framework="numpy") as file:
            assert tensor in file.keys()  # noqa: SIM118


@pytest.mark.parametrize("model", shapes.SHAPES)
def test_shapes_are_the_published_sizes(model: str) -> None:
    """Parameters, in millions, as the models' own pages give them."""
    published = {
        "qwen2-0.5b": 494,
        "qwen2-1.5b": 1544,
        "qwen2-7b": 7616,
        "qwen3-0.6b": 596,
        "gemma-3-1b": 999.9,
        "llama-3.2-1b": 1236,
        "llama-2-7b": 6738,
        "tinyllama-1.1b": 1100,
        "smollm-135m": 134.5,
    }
    assert synth.nbytes(model) / 2e6 == pytest.approx(published[model], rel=2e-3)

"""Whole models, compiled and run, against transformers on the same random checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from axc import build
from axrun.format.bundle import Bundle
from axrun.model import Model

SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "qwen2 tied": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2 untied, every head its own K/V": (transformers.Qwen2Config, {"num_key_value_heads": 4}),
    "llama 2": (transformers.LlamaConfig, {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama 3.2": (transformers.LlamaConfig, {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama, linear rope": (
        transformers.LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "llama, biases everywhere": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama, odd head_dim": (transformers.LlamaConfig, {"head_dim": 48}),
    "smollm, three query heads to one": (
        transformers.LlamaConfig,
        {"hidden_size": 288, "num_attention_heads": 9, "num_key_value_heads": 3},
    ),
}


def checkpoint(folder: Path, variant: str) -> Any:
    """A random checkpoint on disk, biases and norms included; returns the model."""
    kind, particular = VARIANTS[variant]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind(**{**SMALL, **particular}), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + (1 if "norm" in name else 0))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_agree_with_transformers(variant: str, tmp_path: Path) -> None:
    """100 tokens through three prefill groups and decode, float32; only the embedding table is bfloat16 by contract."""
    reference = checkpoint(tmp_path / "hf", variant)
    output = tmp_path / "out"
    floats: dict[str, Any] = {"hidden_state_type": "fp32", "weight_type": "fp32", "post_weight_type": "fp32"}
    groups: dict[str, Any] = {"prefill_len": 16, "kv_cache_len": 127, "last_kv_cache_len": (16, 48)}
    build.build(build.plan(build.Options(tmp_path / "hf", output, **floats, **groups)))
    ids = np.random.default_rng(1).integers(0, SMALL["vocab_size"], 100).tolist()
    table = reference.get_input_embeddings().weight.detach()
    with torch.inference_mode():
        rounded = table.bfloat16().float()[torch.tensor([ids])]
        expected = reference(inputs_embeds=rounded).logits[0].numpy()
    logits = Model.load(Bundle.open(output)).forward(ids, 0, logits="all")
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()

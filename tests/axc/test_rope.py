"""Rotary tables against transformers' own frequencies and the C library's cosines."""

from __future__ import annotations

import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from axc import rope
from axc.rope import Rope

ROPES = {
    "default": (Rope(1e6), {"rope_type": "default", "rope_theta": 1e6}),
    "linear": (Rope(1e4, "linear", 4.0), {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "llama3": (
        Rope(5e5, "llama3", 32.0, 1.0, 4.0, 8192),
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
}


@pytest.mark.parametrize("kind", ROPES)
def test_frequencies_are_transformers(kind: str) -> None:
    ours, parameters = ROPES[kind]
    config = transformers.LlamaConfig(hidden_size=512, num_attention_heads=8, rope_parameters=parameters)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    assert kind == "default" or kind in ROPE_INIT_FUNCTIONS
    np.testing.assert_allclose(rope.frequencies(ours, 64), rotary.inv_freq.numpy(), rtol=3e-7)


@pytest.mark.parametrize("kind", ROPES)
def test_tables_are_correctly_rounded(kind: str) -> None:
    """The float32 nearest to the cosine of the float32 angle, up to the longest contexts there are."""
    ours, _ = ROPES[kind]
    positions = 131072
    cos, sin = rope.tables(ours, 64, positions)
    angles = (np.arange(positions, dtype=np.float32)[:, None] * rope.frequencies(ours, 64)).astype(np.float64)
    assert (cos == np.cos(angles).astype(np.float32)).all()
    assert (sin == np.sin(angles).astype(np.float32)).all()

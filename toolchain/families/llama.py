"""Llama: Llama 2, 3 and 3.2, TinyLlama, SmolLM. Biases only where config.json asks for them."""

from __future__ import annotations

from toolchain.config import ModelConfig, Reader, read_rope
from toolchain.families.decoder import REDUNDANT, decoder_layer, post, tensors

__all__ = ["REDUNDANT", "decoder_layer", "post", "read_config", "tensors"]


def read_config(reader: Reader) -> ModelConfig:
    """ModelConfig from a Llama config.json. Raises BadInput."""
    reader.expect("hidden_act", "silu")
    heads, hidden = reader.integer("num_attention_heads"), reader.integer("hidden_size")
    bias = reader.flag("attention_bias", False)
    return ModelConfig(
        model_type="llama",
        hidden_size=hidden,
        intermediate_size=reader.integer("intermediate_size"),
        num_hidden_layers=reader.integer("num_hidden_layers", high=1024),
        num_attention_heads=heads,
        num_key_value_heads=reader.divisor("num_key_value_heads", heads),
        head_dim=reader.head_dim(hidden, heads),
        vocab_size=reader.integer("vocab_size"),
        max_position_embeddings=reader.integer("max_position_embeddings", 2048),
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6, low=1e-12, high=1),
        rope=read_rope(reader),
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=reader.flag("mlp_bias", False),
        sliding_window=None,
    )

"""Llama: Llama 2, 3 and 3.2, TinyLlama, SmolLM. Biases only where config.json asks for them."""

from __future__ import annotations

from toolchain.config import ModelConfig, Reader
from toolchain.families import decoder
from toolchain.families.decoder import REDUNDANT, decoder_layer, post, tensors

__all__ = ["REDUNDANT", "decoder_layer", "post", "read_config", "tensors"]


def read_config(reader: Reader) -> ModelConfig:
    """ModelConfig from a Llama config.json. Raises BadInput."""
    bias, mlp_bias = reader.flag("attention_bias", False), reader.flag("mlp_bias", False)
    return decoder.read_config(reader, "llama", positions=2048, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias)

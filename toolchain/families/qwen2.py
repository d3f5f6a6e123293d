"""Qwen2: Qwen1.5, Qwen2 and Qwen2.5. Biases on q, k and v, none elsewhere."""

from __future__ import annotations

from toolchain.config import ModelConfig, Reader
from toolchain.families import decoder
from toolchain.families.decoder import REDUNDANT, decoder_layer, post, tensors

__all__ = ["REDUNDANT", "decoder_layer", "post", "read_config", "tensors"]


def read_config(reader: Reader) -> ModelConfig:
    """ModelConfig from a Qwen2 config.json. Raises BadInput."""
    window = reader.integer("sliding_window", 4096) if reader.flag("use_sliding_window", False) else None
    return decoder.read_config(
        reader, "qwen2", positions=32768, qkv_bias=True, o_bias=False, mlp_bias=False, sliding_window=window
    )

"""Qwen2: Qwen1.5, Qwen2 and Qwen2.5. Biases on q, k and v, none elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from axc.config import Kin, ModelConfig, Reader
from axc.families import decoder
from axc.families.decoder import REDUNDANT, decoder_layer, post, tensors
from axrun.errors import BadInput

__all__ = ["DEFAULTS", "DIFFERENT", "KIN", "READS", "REDUNDANT", "decoder_layer", "post", "read_config", "tensors"]

READS = decoder.READS | {"use_sliding_window", "max_window_layers"}
# of a key that is absent, as in transformers' Qwen2Config
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    }
)
KIN: Mapping[str, Kin] = MappingProxyType({})
DIFFERENT: Mapping[str, str] = MappingProxyType({})


def read_config(reader: Reader) -> ModelConfig:
    """ModelConfig from a Qwen2 config.json. Raises BadInput."""
    window = _window(reader)
    return decoder.read_config(reader, "qwen2", qkv_bias=True, o_bias=False, mlp_bias=False, sliding_window=window)


def _window(reader: Reader) -> int | None:
    """Positions seen by the layers that see fewest; None where all see everything."""
    in_use = reader.flag("use_sliding_window") and reader.get("sliding_window") is not None
    slides = decoder.sliding_layers(reader)
    if slides is None:
        layers = reader.integer("num_hidden_layers", high=1024)
        slides = in_use and reader.integer("max_window_layers", low=0) < layers
    if slides and not in_use:
        raise BadInput(f"{reader.path}: layer_types has sliding_attention, but no sliding_window is in use")
    return reader.integer("sliding_window") if slides else None

"""GLM-4 of 2024: interleaved rotary embedding of half of each head; gate and up in one matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from axc.config_json import Reader
from axc.families import blocks
from axc.families.blocks import DecoderConfig, Rotation, Sources
from axc.families.family import Family
from axc.graph import Graph

# Values of absent keys, as in transformers' config class.
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 13696,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1.5625e-07,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "head_dim": 128,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
    }
)


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    attention_bias: bool


def config(reader: Reader) -> Config:
    return read(reader, "glm")


def read(reader: Reader, model_type: str) -> Config:
    """The config of GLM and GLM-4."""
    reader.expect("hidden_act", "silu", "swish")
    fields = blocks.decoder(reader, partial=True)
    return Config(model_type=model_type, **fields, attention_bias=reader.flag("attention_bias"))


def weights(config: Config) -> Sources:
    return weights_with(config, "input_layernorm", "post_attention_layernorm")


def weights_with(config: Config, *norms: str) -> Sources:
    """The weights, with these norms in each layer."""
    hidden, inner = config.hidden_size, config.intermediate_size

    def layer(prefix: str, index: int) -> Sources:
        gate_up = {f"{prefix}mlp.gate_proj": inner, f"{prefix}mlp.up_proj": inner}
        return {
            **blocks.norm_weights(prefix, hidden, *norms),
            **blocks.attention_weights(prefix, config, config.attention_bias),
            **blocks.fused(f"{prefix}mlp.gate_up_proj", gate_up, hidden),
            **blocks.matrix(f"{prefix}mlp.down_proj", hidden, inner),
        }

    return blocks.decoder_weights(config, layer)


def layer(config: Config, index: int, positions: int, graph: Graph) -> None:
    blocks.pre_norm_layer(graph, config, index, Rotation(config.rope, positions, interleaved=True))


post = blocks.post_rms


FAMILY = Family(
    config=config,
    weights=weights,
    layer=layer,
    post=post,
    reads=blocks.READS | {"attention_bias", "partial_rotary_factor"},
    defaults=DEFAULTS,
)

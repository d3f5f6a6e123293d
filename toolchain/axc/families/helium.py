"""Helium: Llama with interleaved rotary embedding."""

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
        "vocab_size": 48000,
        "hidden_size": 2560,
        "intermediate_size": 7040,
        "num_hidden_layers": 24,
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-8,
        "rope_theta": 100000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    }
)


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    attention_bias: bool
    mlp_bias: bool


def config(reader: Reader) -> Config:
    reader.expect("hidden_act", "silu", "swish")
    return Config(
        model_type="helium",
        **blocks.decoder(reader),
        attention_bias=reader.flag("attention_bias"),
        mlp_bias=reader.flag("mlp_bias"),
    )


def weights(config: Config) -> Sources:
    return blocks.pre_norm_weights(config, qkv_bias=config.attention_bias, mlp_bias=config.mlp_bias)


def layer(config: Config, index: int, positions: int, graph: Graph) -> None:
    blocks.pre_norm_layer(graph, config, index, Rotation(config.rope, positions, interleaved=True))


FAMILY = Family(
    config=config,
    weights=weights,
    layer=layer,
    post=blocks.post_rms,
    reads=blocks.READS | {"attention_bias", "mlp_bias"},
    defaults=DEFAULTS,
)

"""Arcee (AFM): Llama with an MLP without a gate and squared ReLU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
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
        "vocab_size": 32000,
        "hidden_size": 2560,
        "intermediate_size": 18432,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    }
)


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    attention_bias: bool
    mlp_bias: bool
    activation: str


def config(reader: Reader) -> Config:
    return Config(
        model_type="arcee",
        **blocks.decoder(reader),
        attention_bias=reader.flag("attention_bias"),
        mlp_bias=reader.flag("mlp_bias"),
        activation=blocks.activation(reader),
    )


def weights(config: Config) -> Sources:
    return blocks.pre_norm_weights(
        config,
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        mlp=blocks.plain_mlp_weights,
    )


def layer(config: Config, index: int, positions: int, graph: Graph) -> None:
    mlp = partial(blocks.plain_mlp, kind=config.activation)
    blocks.pre_norm_layer(graph, config, index, Rotation(config.rope, positions), mlp=mlp)


FAMILY = Family(
    config=config,
    weights=weights,
    layer=layer,
    post=blocks.post_rms,
    reads=blocks.READS | {"attention_bias", "mlp_bias"},
    defaults=DEFAULTS,
)

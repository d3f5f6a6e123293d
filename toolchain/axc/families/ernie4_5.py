"""ERNIE 4.5 (dense): Llama with interleaved rotary embedding."""

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
        "vocab_size": 103424,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "head_dim": 128,
        "use_bias": False,
    }
)


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    use_bias: bool


def config(reader: Reader) -> Config:
    reader.expect("hidden_act", "silu", "swish")
    return Config(model_type="ernie4_5", **blocks.decoder(reader), use_bias=reader.flag("use_bias"))


def weights(config: Config) -> Sources:
    return blocks.pre_norm_weights(config, qkv_bias=config.use_bias, o_bias=config.use_bias, mlp_bias=config.use_bias)


def layer(config: Config, index: int, positions: int, graph: Graph) -> None:
    blocks.pre_norm_layer(graph, config, index, Rotation(config.rope, positions, interleaved=True))


post = blocks.post_rms


FAMILY = Family(
    config=config,
    weights=weights,
    layer=layer,
    post=post,
    reads=blocks.READS | {"use_bias"},
    defaults=DEFAULTS,
)

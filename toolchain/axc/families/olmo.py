"""OLMo: Llama with norms without weights; q, k and v may be clipped."""

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
        "vocab_size": 50304,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "clip_qkv": None,
    }
)

EPSILON = 1e-5  # of the norms; no key has it


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    attention_bias: bool
    clip_qkv: float | None
    activation: str


def config(reader: Reader) -> Config:
    clip = None if reader.get("clip_qkv") is None else reader.number("clip_qkv", low=1e-3, high=1e6)
    return Config(
        model_type="olmo",
        **blocks.decoder(reader, epsilon=EPSILON),
        attention_bias=reader.flag("attention_bias"),
        clip_qkv=clip,
        activation=blocks.activation(reader),
    )


def weights(config: Config) -> Sources:
    def layer(prefix: str, index: int) -> Sources:
        return {
            **blocks.attention_weights(prefix, config, config.attention_bias, config.attention_bias),
            **blocks.gated_mlp_weights(prefix, config.hidden_size, config.intermediate_size),
        }

    return blocks.decoder_weights(config, layer, norm=None)


def layer(config: Config, index: int, positions: int, graph: Graph) -> None:
    norm, mlp = blocks.bare_layer_norm(EPSILON), partial(blocks.gated_mlp, kind=config.activation)
    rotation = Rotation(config.rope, positions)
    blocks.pre_norm_layer(graph, config, index, rotation, norm=norm, mlp=mlp, clip=config.clip_qkv)


def post(config: Config, top_k: int, graph: Graph) -> None:
    blocks.post(config, blocks.bare_layer_norm(EPSILON), top_k, graph)


FAMILY = Family(
    config=config,
    weights=weights,
    layer=layer,
    post=post,
    reads=(blocks.READS - {"rms_norm_eps"}) | {"attention_bias", "clip_qkv"},
    defaults=DEFAULTS,
)

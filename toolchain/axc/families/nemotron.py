"""Nemotron: LayerNorm with 1 + weight, rotary embedding of half of each head, an MLP with squared ReLU."""

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
from axc.weights.sources import one_plus

# Values of absent keys, as in transformers' config class.
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 256000,
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_hidden_layers": 32,
        "num_attention_heads": 48,
        "num_key_value_heads": None,
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
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
        model_type="nemotron",
        **blocks.decoder(reader, epsilon="norm_eps", partial=True),
        attention_bias=reader.flag("attention_bias"),
        mlp_bias=reader.flag("mlp_bias"),
        activation=blocks.activation(reader),
    )


def weights(config: Config) -> Sources:
    hidden = config.hidden_size

    def layer(prefix: str, index: int) -> Sources:
        return {
            **norms(prefix, hidden, "input_layernorm", "post_attention_layernorm"),
            **blocks.attention_weights(prefix, config, config.attention_bias, config.attention_bias),
            **blocks.plain_mlp_weights(prefix, hidden, config.intermediate_size, config.mlp_bias),
        }

    return {**blocks.decoder_weights(config, layer, norm_bias=True), **norms("model.", hidden, "norm")}


def norms(prefix: str, size: int, *names: str) -> Sources:
    """The weights of norms that multiply by 1 + weight."""
    stored = blocks.norm_weights(prefix, size, *names, bias=True)
    return {name: one_plus(source) if name.endswith(".weight") else source for name, source in stored.items()}


def layer(config: Config, index: int, positions: int, graph: Graph) -> None:
    norm, mlp = blocks.layer_norm(config.rms_norm_eps), partial(blocks.plain_mlp, kind=config.activation)
    blocks.pre_norm_layer(graph, config, index, Rotation(config.rope, positions), norm=norm, mlp=mlp)


def post(config: Config, top_k: int, graph: Graph) -> None:
    blocks.post(config, blocks.layer_norm(config.rms_norm_eps), top_k, graph)


FAMILY = Family(
    config=config,
    weights=weights,
    layer=layer,
    post=post,
    reads=(blocks.READS - {"rms_norm_eps"}) | {"norm_eps", "partial_rotary_factor", "attention_bias", "mlp_bias"},
    defaults=DEFAULTS,
)

"""Gemma: norms multiply by 1 + weight, the embedding is scaled by sqrt(hidden_size), the MLP uses GELU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
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
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "head_dim": 256,
        "attention_bias": False,
        "use_bidirectional_attention": None,
    }
)


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    attention_bias: bool
    activation: str


def config(reader: Reader) -> Config:
    reader.expect("use_bidirectional_attention", None, False)
    return Config(
        model_type="gemma",
        **blocks.decoder(reader),
        attention_bias=reader.flag("attention_bias"),
        # of the official releases: they say gelu, and mean its approximation (`GemmaConfig.__post_init__`)
        activation="gelu tanh" if reader.get("hidden_act") == "gelu" else blocks.activation(reader),
    )


def norms(layer: str, size: int, *names: str) -> Sources:
    """The weights of several norms: 1 + weight."""
    return {name: one_plus(source) for name, source in blocks.norm_weights(layer, size, *names).items()}


def weights(config: Config) -> Sources:
    hidden, bias = config.hidden_size, config.attention_bias

    def layer(prefix: str, index: int) -> Sources:
        return {
            **norms(prefix, hidden, "input_layernorm", "post_attention_layernorm"),
            **blocks.attention_weights(prefix, config, bias, bias),
            **blocks.gated_mlp_weights(prefix, hidden, config.intermediate_size),
        }

    return {**blocks.decoder_weights(config, layer), **norms("model.", hidden, "norm")}


def layer(config: Config, index: int, positions: int, graph: Graph) -> None:
    prefix, norm = f"model.layers.{index}.", blocks.rms(config.rms_norm_eps)
    given = blocks.inputs(config, graph, embedding_scale(config, index))
    normed = norm(graph, given.x, f"{prefix}input_layernorm")
    rotation = Rotation(config.rope, positions)
    x = graph.add(given.x, blocks.attention(graph, given, normed, prefix, config, rotation))
    normed = norm(graph, x, f"{prefix}post_attention_layernorm")
    x = graph.add(x, blocks.gated_mlp(graph, normed, prefix, config.activation))
    graph.output("output", x, graph.hidden_type)


def embedding_scale(config: DecoderConfig, index: int) -> float:
    """The factor on a layer's input: the first layer gets the embedding."""
    return 1.0 if index else math.sqrt(config.hidden_size)


post = blocks.post_rms


FAMILY = Family(
    config=config,
    weights=weights,
    layer=layer,
    post=post,
    reads=blocks.READS | {"attention_bias", "use_bidirectional_attention"},
    defaults=DEFAULTS,
)

"""Mistral: Llama without biases; all layers have a window if sliding_window is set."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from axc.config_json import Reader
from axc.families import blocks
from axc.families.blocks import DecoderConfig, Rotation, Sources
from axc.families.family import Family, Inside
from axc.graph import Graph

# Values of absent keys, as in transformers' config class.
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "sliding_window": 4096,
    }
)


Config = DecoderConfig


def config(reader: Reader) -> Config:
    return read(reader, "mistral")


def read(reader: Reader, model_type: str) -> Config:
    """The config of Mistral and Ministral."""
    reader.expect("hidden_act", "silu", "swish")
    layers = reader.integer("num_hidden_layers", high=1024)
    kinds = blocks.sliding_layers(reader) or (reader.get("sliding_window") is not None,) * layers
    return Config(model_type=model_type, **blocks.decoder(reader), **blocks.window(reader, kinds))


def weights(config: Config) -> Sources:
    return blocks.pre_norm_weights(config)


def layer(config: Config, index: int, positions: int, graph: Graph) -> None:
    blocks.pre_norm_layer(graph, config, index, Rotation(config.rope, positions))


post = blocks.post_rms


FAMILY = Family(
    config=config,
    weights=weights,
    layer=layer,
    post=post,
    reads=blocks.READS | blocks.WINDOW,
    defaults=DEFAULTS,
    keeps=blocks.keeps,
    inside={"mistral3": Inside(tied=True)},
)

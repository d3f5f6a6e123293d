"""Qwen2: Qwen1.5, Qwen2 and Qwen2.5. Biases on q, k and v only."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from axc.config_json import Reader
from axc.families import blocks
from axc.families.blocks import DecoderConfig, Rotation, Sources
from axc.families.family import Family, Gguf
from axc.graph import Graph
from axrun.errors import BadInput

# Values of absent keys, as in transformers' config class.
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
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    }
)


Config = DecoderConfig


def config(reader: Reader) -> Config:
    return read(reader, "qwen2")


def read(reader: Reader, model_type: str) -> Config:
    """The config of Qwen2 and of the text model of Qwen2-VL."""
    reader.expect("hidden_act", "silu", "swish")
    return Config(model_type=model_type, **blocks.decoder(reader), **blocks.window(reader, sliding(reader)))


def sliding(reader: Reader) -> tuple[bool, ...]:
    """Which layers have a window."""
    in_use = reader.flag("use_sliding_window") and reader.get("sliding_window") is not None
    kinds = blocks.sliding_layers(reader)
    if kinds is None:
        layers = reader.integer("num_hidden_layers", high=1024)
        first = reader.integer("max_window_layers", low=0) if in_use else layers
        kinds = tuple(index >= first for index in range(layers))
    if any(kinds) and not in_use:
        raise BadInput(f"{reader.path}: layer_types has sliding_attention, but no sliding_window is in use")
    return kinds


def weights(config: Config) -> Sources:
    return blocks.pre_norm_weights(config, qkv_bias=True)


def layer(config: Config, index: int, positions: int, graph: Graph) -> None:
    blocks.pre_norm_layer(graph, config, index, Rotation(config.rope, positions))


post = blocks.post_rms


FAMILY = Family(
    config=config,
    weights=weights,
    layer=layer,
    post=post,
    reads=blocks.READS | blocks.WINDOW | {"use_sliding_window", "max_window_layers"},
    defaults=DEFAULTS,
    keeps=blocks.keeps,
    foreign=True,
    axllm_tokenizer="Qwen2_5",
    gguf=Gguf("qwen2", blocks.GGUF_LAYER),
)

"""SmolLM3: Llama without rotary embedding in every fourth layer."""

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
from axrun.errors import BadInput

# Values of absent keys, as in transformers' config class.
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-06,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "attention_bias": False,
        "mlp_bias": False,
    }
)


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    attention_bias: bool
    mlp_bias: bool
    rotates: tuple[bool, ...]


def config(reader: Reader) -> Config:
    reader.expect("hidden_act", "silu", "swish")
    rotates = _rotates(reader)
    kinds = blocks.sliding_layers(reader)
    in_use = reader.flag("use_sliding_window") and reader.get("sliding_window") is not None
    if kinds is None:
        kinds = tuple(in_use and not turns for turns in rotates)
    if any(kinds) and not in_use:
        raise BadInput(f"{reader.path}: layer_types has sliding_attention, but no sliding_window is in use")
    return Config(
        model_type="smollm3",
        **blocks.decoder(reader),
        **blocks.window(reader, kinds),
        attention_bias=reader.flag("attention_bias"),
        mlp_bias=reader.flag("mlp_bias"),
        rotates=rotates,
    )


def _rotates(reader: Reader) -> tuple[bool, ...]:
    """Which layers use rotary embedding: no_rope_layers is 1 for those, despite its name."""
    layers, given = reader.integer("num_hidden_layers", high=1024), reader.get("no_rope_layers")
    if given is None:
        interval = reader.integer("no_rope_layer_interval")
        return tuple(bool((index + 1) % interval) for index in range(layers))
    if not isinstance(given, list) or len(given) != layers or any(one not in (0, 1) for one in given):
        raise BadInput(f"{reader.path}: no_rope_layers is {given!r:.60}; expected 0 or 1 for each layer")
    return tuple(bool(one) for one in given)


def weights(config: Config) -> Sources:
    return blocks.pre_norm_weights(
        config, qkv_bias=config.attention_bias, o_bias=config.attention_bias, mlp_bias=config.mlp_bias
    )


def layer(config: Config, index: int, positions: int, graph: Graph) -> None:
    rotation = Rotation(config.rope, positions) if config.rotates[index] else None
    blocks.pre_norm_layer(graph, config, index, rotation)


post = blocks.post_rms


FAMILY = Family(
    config=config,
    weights=weights,
    layer=layer,
    post=post,
    reads=blocks.READS
    | blocks.WINDOW
    | {"use_sliding_window", "no_rope_layers", "no_rope_layer_interval", "attention_bias", "mlp_bias"},
    defaults=DEFAULTS,
    keeps=blocks.keeps,
)

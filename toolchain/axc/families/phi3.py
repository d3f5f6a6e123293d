"""Phi-3, Phi-3.5 mini and Phi-4-mini: one matrix for q, k and v, one for gate and up; all layers have a window."""

from __future__ import annotations

from collections.abc import Mapping
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
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "original_max_position_embeddings": 4096,
        "sliding_window": None,
    }
)


Config = DecoderConfig


def config(reader: Reader) -> Config:
    reader.expect("hidden_act", "silu", "swish")
    layers = reader.integer("num_hidden_layers", high=1024)
    slides = reader.get("sliding_window") is not None
    filled = {"original_max_position_embeddings": reader.get("original_max_position_embeddings"), **reader.values}
    fields = blocks.decoder(Reader(filled, reader.path, reader.defaults), partial=True)
    if fields["rope"].kind not in ("default", "longrope"):
        raise BadInput(f"{reader.path}: rope type {fields['rope'].kind} is none of Phi-3's: default, longrope")
    return Config(
        model_type="phi3",
        **fields,
        **blocks.window(reader, (slides,) * layers),
    )


def weights(config: Config) -> Sources:
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv = config.num_attention_heads * config.head_dim, config.kv_size

    def layer(prefix: str, index: int) -> Sources:
        qkv = {f"{prefix}self_attn.{part}_proj": rows for part, rows in (("q", heads), ("k", kv), ("v", kv))}
        gate_up = {f"{prefix}mlp.gate_proj": inner, f"{prefix}mlp.up_proj": inner}
        return {
            **blocks.norm_weights(prefix, hidden, "input_layernorm", "post_attention_layernorm"),
            **blocks.fused(f"{prefix}self_attn.qkv_proj", qkv, hidden),
            **blocks.matrix(f"{prefix}self_attn.o_proj", hidden, heads),
            **blocks.fused(f"{prefix}mlp.gate_up_proj", gate_up, hidden),
            **blocks.matrix(f"{prefix}mlp.down_proj", hidden, inner),
        }

    return blocks.decoder_weights(config, layer)


def layer(config: Config, index: int, positions: int, graph: Graph) -> None:
    blocks.pre_norm_layer(graph, config, index, Rotation(config.rope, positions))


post = blocks.post_rms


FAMILY = Family(
    config=config,
    weights=weights,
    layer=layer,
    post=post,
    reads=blocks.READS | {"sliding_window", "partial_rotary_factor", "original_max_position_embeddings"},
    defaults=DEFAULTS,
    keeps=blocks.keeps,
)

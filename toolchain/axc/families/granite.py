"""Granite: Llama with multipliers for embedding, residuals, attention and logits."""

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
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
    }
)


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    attention_bias: bool
    mlp_bias: bool
    embedding_multiplier: float
    residual_multiplier: float
    attention_multiplier: float | None
    logits_scaling: float


def config(reader: Reader) -> Config:
    reader.expect("hidden_act", "silu", "swish")
    multipliers: dict[str, Any] = {
        key: reader.number(key, low=1e-6, high=1e6)
        for key in ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
    }
    return Config(
        model_type="granite",
        **blocks.decoder(reader),
        attention_bias=reader.flag("attention_bias"),
        mlp_bias=reader.flag("mlp_bias"),
        **multipliers,
    )


def weights(config: Config) -> Sources:
    return blocks.pre_norm_weights(
        config, qkv_bias=config.attention_bias, o_bias=config.attention_bias, mlp_bias=config.mlp_bias
    )


def layer(config: Config, index: int, positions: int, graph: Graph) -> None:
    prefix, norm = f"model.layers.{index}.", blocks.rms(config.rms_norm_eps)
    given = blocks.inputs(config, graph, 1.0 if index else config.embedding_multiplier)
    normed = norm(graph, given.x, f"{prefix}input_layernorm")
    rotation, scale = Rotation(config.rope, positions), config.attention_multiplier
    attended = blocks.attention(graph, given, normed, prefix, config, rotation, scale=scale)
    x = graph.add(given.x, graph.scale(attended, "residual.scale", config.residual_multiplier))
    down = blocks.gated_mlp(graph, norm(graph, x, f"{prefix}post_attention_layernorm"), prefix)
    x = graph.add(x, graph.scale(down, "residual.scale", config.residual_multiplier))
    graph.output("output", x, graph.hidden_type)


def post(config: Config, top_k: int, graph: Graph) -> None:
    blocks.post(config, blocks.rms(config.rms_norm_eps), top_k, graph, scale=1 / config.logits_scaling)


FAMILY = Family(
    config=config,
    weights=weights,
    layer=layer,
    post=post,
    reads=blocks.READS
    | {"attention_bias", "mlp_bias"}
    | {"embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"},
    defaults=DEFAULTS,
)

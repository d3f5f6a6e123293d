"""Hunyuan dense: Llama with norms of each head of q and k after rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from types import MappingProxyType
from typing import Any

from axc.config_json import Reader
from axc.families import blocks
from axc.families.blocks import DecoderConfig, HeadNorm, Rotation, Sources
from axc.families.family import Family
from axc.graph import Graph
from axc.rope import Rope

# Values of absent keys, as in transformers' config class.
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 290943,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
    }
)


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    attention_bias: bool


def config(reader: Reader) -> Config:
    reader.expect("hidden_act", "silu", "swish")
    fields = blocks.decoder(reader)
    fields["rope"] = _stretched(reader, fields["rope"], fields["head_dim"])
    return Config(model_type="hunyuan_v1_dense", **fields, attention_bias=reader.flag("attention_bias"))


def _stretched(reader: Reader, rope: Rope, head_dim: int) -> Rope:
    """The rope with base theta * alpha^(d / (d - 2)), if its type is dynamic with a fixed `alpha`.

    transformers' HunYuanDenseV1RotaryEmbedding.compute_ntk_alpha_rope_parameters. Raises BadInput.
    """
    nested = reader.values.get("rope_scaling") or reader.values.get("rope_parameters") or {}
    if nested.get("rope_type", nested.get("type")) != "dynamic" or not nested.get("alpha"):
        return rope
    alpha = Reader(nested, reader.path).number("alpha", low=1e-3, high=1e9)
    power = Decimal(head_dim) / Decimal(head_dim - 2) if head_dim > 2 else Decimal(1)
    return replace(rope, theta=rope.theta * float(Decimal(alpha) ** power))  # Decimal: equal on all machines


def weights(config: Config) -> Sources:
    return blocks.pre_norm_weights(
        config, qkv_bias=config.attention_bias, o_bias=config.attention_bias, head_norms=NORMS
    )


NORMS = ("self_attn.query_layernorm", "self_attn.key_layernorm")


def layer(config: Config, index: int, positions: int, graph: Graph) -> None:
    head_norm = HeadNorm(blocks.rms(config.rms_norm_eps), NORMS, rotated_first=True)
    blocks.pre_norm_layer(graph, config, index, Rotation(config.rope, positions), head_norm=head_norm)


post = blocks.post_rms


FAMILY = Family(
    config=config,
    weights=weights,
    layer=layer,
    post=post,
    reads=blocks.READS | {"attention_bias"},
    defaults=DEFAULTS,
)

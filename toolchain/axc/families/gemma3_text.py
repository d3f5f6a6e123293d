"""Gemma 3 (text): Gemma 2 with norms of each head of q and k, and another rope in layers with a window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from axc.config_json import Reader
from axc.config_rope import rope_by_layer_type
from axc.families import blocks, gemma, gemma2
from axc.families.blocks import HeadNorm, Rotation, Sources
from axc.families.family import Family, Inside
from axc.graph import Graph
from axc.rope import Rope

# Values of absent keys, as in transformers' config class.
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "head_dim": 256,
        "attention_bias": False,
        "use_bidirectional_attention": False,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window_pattern": 6,
        "rope_local_base_freq": 10000.0,
    }
)


@dataclass(frozen=True, kw_only=True)
class Config(gemma2.Config):
    local_rope: Rope  # of layers with a window


def config(reader: Reader) -> Config:
    layers, pattern = reader.integer("num_hidden_layers", high=1024), reader.integer("sliding_window_pattern")
    kinds = blocks.sliding_layers(reader) or tuple(bool((index + 1) % pattern) for index in range(layers))
    fields = blocks.decoder(blocks.without_ropes(reader))
    size, head_dim = fields["max_position_embeddings"], fields["head_dim"]
    fields["rope"] = rope_by_layer_type(reader, "full_attention", "rope_theta", size, head_dim)
    own = Reader({**reader.values, "attn_logit_softcapping": None}, reader.path, reader.defaults)  # it has no such cap
    return Config(
        model_type="gemma3_text",
        **fields,
        **blocks.window(reader, kinds),
        **gemma2.particular(own),
        local_rope=rope_by_layer_type(reader, "sliding_attention", "rope_local_base_freq", size, head_dim),
    )


def weights(config: Config) -> Sources:
    found = gemma2.weights(config)
    for index in range(config.num_hidden_layers):
        found |= gemma.norms(f"model.layers.{index}.", config.head_dim, "self_attn.q_norm", "self_attn.k_norm")
    return found


def layer(config: Config, index: int, positions: int, graph: Graph) -> None:
    rotation = Rotation(config.local_rope if config.sliding and config.sliding[index] else config.rope, positions)
    gemma2.four_norm_layer(config, index, rotation, HeadNorm(blocks.rms(config.rms_norm_eps)), graph)


post = gemma2.post


FAMILY = Family(
    config=config,
    weights=weights,
    layer=layer,
    post=post,
    reads=(gemma2.READS - {"attn_logit_softcapping"}) | {"sliding_window_pattern", "rope_local_base_freq"},
    defaults=DEFAULTS,
    keeps=blocks.keeps,
    inside={"gemma3": Inside(tied=True)},
)

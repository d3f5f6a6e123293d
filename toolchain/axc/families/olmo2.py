"""OLMo 2: norms after attention and MLP, none before; q and k are normalised over all heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from axc.config_json import Reader
from axc.families import blocks
from axc.families.blocks import DecoderConfig, HeadNorm, Rotation, Sources
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
    return Config(model_type="olmo2", **blocks.decoder(reader), attention_bias=reader.flag("attention_bias"))


def weights(config: Config) -> Sources:
    hidden, bias = config.hidden_size, config.attention_bias

    def layer(prefix: str, index: int) -> Sources:
        return {
            **blocks.norm_weights(prefix, hidden, "post_attention_layernorm", "post_feedforward_layernorm"),
            **blocks.attention_weights(prefix, config, bias, bias),
            **blocks.vector(f"{prefix}self_attn.q_norm", config.num_attention_heads * config.head_dim),
            **blocks.vector(f"{prefix}self_attn.k_norm", config.kv_size),
            **blocks.gated_mlp_weights(prefix, hidden, config.intermediate_size),
        }

    return blocks.decoder_weights(config, layer)


def layer(config: Config, index: int, positions: int, graph: Graph) -> None:
    norm = blocks.rms(config.rms_norm_eps)
    blocks.post_norm_layer(graph, config, index, Rotation(config.rope, positions), HeadNorm(norm, whole=True))


post = blocks.post_rms


FAMILY = Family(
    config=config,
    weights=weights,
    layer=layer,
    post=post,
    reads=blocks.READS | {"attention_bias"},
    defaults=DEFAULTS,
)

"""Qwen3: Qwen2 without biases, with norms of each head of q and k."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from axc.config_json import Reader
from axc.families import blocks
from axc.families.blocks import DecoderConfig, HeadNorm, Rotation, Sources
from axc.families.family import Family, Gguf
from axc.families.qwen2 import sliding
from axc.graph import Graph

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
        "head_dim": 128,
        "attention_bias": False,
    }
)


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    attention_bias: bool


def config(reader: Reader) -> Config:
    return read(reader, "qwen3")


def read(reader: Reader, model_type: str) -> Config:
    """The config of Qwen3 and of the text model of Qwen3-VL."""
    reader.expect("hidden_act", "silu", "swish")
    return Config(
        model_type=model_type,
        **blocks.decoder(reader),
        **blocks.window(reader, sliding(reader)),
        attention_bias=reader.flag("attention_bias"),
    )


def weights(config: Config) -> Sources:
    return blocks.pre_norm_weights(
        config,
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
        head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    )


def layer(config: Config, index: int, positions: int, graph: Graph) -> None:
    head_norm = HeadNorm(blocks.rms(config.rms_norm_eps))
    blocks.pre_norm_layer(graph, config, index, Rotation(config.rope, positions), head_norm=head_norm)


post = blocks.post_rms


FAMILY = Family(
    config=config,
    weights=weights,
    layer=layer,
    post=post,
    reads=blocks.READS | blocks.WINDOW | {"use_sliding_window", "max_window_layers", "attention_bias"},
    defaults=DEFAULTS,
    keeps=blocks.keeps,
    axllm_tokenizer="Qwen3",
    gguf=Gguf(
        "qwen3",
        {**blocks.GGUF_LAYER, "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
    ),
)

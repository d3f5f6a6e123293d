"""Llama: Llama 2, 3 and 3.2, TinyLlama, SmolLM. Biases only if config.json has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
        "sliding_window": None,
    }
)


# Compute differently, although their tensors and config.json could be Llama's.
DIFFERENT: Mapping[str, str] = MappingProxyType(
    {
        "ernie4_5": "its rotary embedding is interleaved, Llama's is not",
        "helium": "its rotary embedding is interleaved, Llama's is not",
        "gemma": "it scales the embedding and adds 1 to the weights of its norms",
    }
)


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """All layers have full attention, but transformers limits the cache, and so the context, to `sliding_window`."""

    attention_bias: bool
    mlp_bias: bool

    @property
    def context(self) -> int:
        return min(super().context, self.sliding_window or super().context)


def config(reader: Reader) -> Config:
    reader.expect("hidden_act", "silu", "swish")
    return Config(
        model_type="llama",
        **blocks.decoder(reader),
        attention_bias=reader.flag("attention_bias"),
        mlp_bias=reader.flag("mlp_bias"),
        sliding_window=_window(reader),
    )


def _window(reader: Reader) -> int | None:
    """The window to which transformers limits the cache; None if there is none."""
    slides, window = blocks.sliding_layers(reader), reader.get("sliding_window")
    if slides and any(slides) and window is None:
        raise BadInput(f"{reader.path}: layer_types has sliding_attention, but there is no sliding_window")
    return None if window is None or (slides and not any(slides)) else reader.integer("sliding_window")


def weights(config: Config) -> Sources:
    return blocks.pre_norm_weights(
        config, qkv_bias=config.attention_bias, o_bias=config.attention_bias, mlp_bias=config.mlp_bias
    )


def layer(config: Config, index: int, positions: int, graph: Graph) -> None:
    blocks.pre_norm_layer(graph, config, index, Rotation(config.rope, positions))


post = blocks.post_rms


FAMILY = Family(
    config=config,
    weights=weights,
    layer=layer,
    post=post,
    reads=blocks.READS | blocks.WINDOW | {"attention_bias", "mlp_bias"},
    defaults=DEFAULTS,
    different=DIFFERENT,
    foreign=True,
    gguf=Gguf(
        "llama",
        blocks.GGUF_LAYER,
        permuted=("attn_q", "attn_k"),
        biases={"attention_bias": "attn_q", "mlp_bias": "ffn_gate"},
    ),
)

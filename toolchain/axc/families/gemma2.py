"""Gemma 2: Gemma with norms before and after attention and MLP, soft caps, and a window in every other layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from axc.config_json import Reader
from axc.families import blocks, gemma
from axc.families.blocks import HeadNorm, Rotation, Sources
from axc.families.family import Family
from axc.graph import Graph

# Values of absent keys, as in transformers' config class.
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "head_dim": 256,
        "attention_bias": False,
        "use_bidirectional_attention": None,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
        "hidden_activation": "gelu_pytorch_tanh",
    }
)


READS = (
    blocks.READS
    | blocks.WINDOW
    | {
        "attention_bias",
        "use_bidirectional_attention",
        "hidden_activation",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    }
)


@dataclass(frozen=True, kw_only=True)
class Config(gemma.Config):
    query_pre_attn_scalar: float
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None


def config(reader: Reader) -> Config:
    layers = reader.integer("num_hidden_layers", high=1024)
    kinds = blocks.sliding_layers(reader) or tuple(index % 2 == 0 for index in range(layers))
    return Config(model_type="gemma2", **blocks.decoder(reader), **blocks.window(reader, kinds), **particular(reader))


def particular(reader: Reader) -> dict[str, Any]:
    """The additional fields of Gemma 2 and 3. Raises BadInput."""
    reader.expect("use_bidirectional_attention", None, False)
    caps = {
        key: None if reader.get(key) is None else reader.number(key, low=1e-3, high=1e6)
        for key in ("attn_logit_softcapping", "final_logit_softcapping")
    }
    return {
        "attention_bias": reader.flag("attention_bias"),
        "activation": blocks.activation(reader, "hidden_activation"),
        "query_pre_attn_scalar": reader.number("query_pre_attn_scalar", low=1e-3, high=1e6),
        **caps,
    }


def weights(config: Config) -> Sources:
    hidden, bias = config.hidden_size, config.attention_bias

    def layer(prefix: str, index: int) -> Sources:
        return {
            **gemma.norms(prefix, hidden, *NORMS),
            **blocks.attention_weights(prefix, config, bias, bias),
            **blocks.gated_mlp_weights(prefix, hidden, config.intermediate_size),
        }

    return {**blocks.decoder_weights(config, layer), **gemma.norms("model.", hidden, "norm")}


NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def layer(config: Config, index: int, positions: int, graph: Graph) -> None:
    four_norm_layer(config, index, Rotation(config.rope, positions), None, graph)


def four_norm_layer(config: Config, index: int, rotation: Rotation, head_norm: HeadNorm | None, graph: Graph) -> None:
    """The layer of Gemma 2 and 3."""
    prefix, norm = f"model.layers.{index}.", blocks.rms(config.rms_norm_eps)
    given = blocks.inputs(config, graph, gemma.embedding_scale(config, index))
    attended = blocks.attention(
        graph,
        given,
        norm(graph, given.x, f"{prefix}input_layernorm"),
        prefix,
        config,
        rotation,
        head_norm=head_norm,
        scale=config.query_pre_attn_scalar**-0.5,
        softcap=config.attn_logit_softcapping,
    )
    x = graph.add(given.x, norm(graph, attended, f"{prefix}post_attention_layernorm"))
    normed = norm(graph, x, f"{prefix}pre_feedforward_layernorm")
    down = blocks.gated_mlp(graph, normed, prefix, config.activation)
    x = graph.add(x, norm(graph, down, f"{prefix}post_feedforward_layernorm"))
    graph.output("output", x, graph.hidden_type)


def post(config: Config, top_k: int, graph: Graph) -> None:
    softcap = config.final_logit_softcapping
    blocks.post(config, blocks.rms(config.rms_norm_eps), top_k, graph, softcap=softcap)


FAMILY = Family(
    config=config,
    weights=weights,
    layer=layer,
    post=post,
    reads=READS,
    defaults=DEFAULTS,
    keeps=blocks.keeps,
)

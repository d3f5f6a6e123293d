"""Phi-1, Phi-1.5 and Phi-2: one LayerNorm, then attention and MLP in parallel; partial rotary embedding.

With qk_layernorm each head of q and k goes through a LayerNorm too.
"""

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
        "vocab_size": 51200,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "hidden_act": "gelu_new",
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "layer_norm_eps": 1e-05,
        "partial_rotary_factor": 0.5,
        "qk_layernorm": False,
    }
)


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    activation: str
    qk_layernorm: bool


def config(reader: Reader) -> Config:
    fields = blocks.decoder(reader, epsilon="layer_norm_eps", partial=True)
    return Config(
        model_type="phi", **fields, activation=blocks.activation(reader), qk_layernorm=reader.flag("qk_layernorm")
    )


def weights(config: Config) -> Sources:
    hidden, inner = config.hidden_size, config.intermediate_size

    def layer(prefix: str, index: int) -> Sources:
        found = blocks.attention_weights(prefix, config, qkv_bias=True)
        found = {name: source for name, source in found.items() if "o_proj" not in name}
        head_norms = HEAD_NORMS if config.qk_layernorm else ()
        return {
            **blocks.norm_weights(prefix, hidden, "input_layernorm", bias=True),
            **found,
            **blocks.norm_weights(prefix, config.head_dim, *head_norms, bias=True),
            **blocks.matrix(f"{prefix}self_attn.dense", hidden, config.num_attention_heads * config.head_dim, True),
            **blocks.matrix(f"{prefix}mlp.fc1", inner, hidden, True),
            **blocks.matrix(f"{prefix}mlp.fc2", hidden, inner, True),
        }

    return blocks.decoder_weights(config, layer, NORM, norm_bias=True, head_bias=True)


NORM = "model.final_layernorm"
HEAD_NORMS = ("self_attn.q_layernorm", "self_attn.k_layernorm")


def layer(config: Config, index: int, positions: int, graph: Graph) -> None:
    prefix, norm = f"model.layers.{index}.", blocks.layer_norm(config.rms_norm_eps)
    given = blocks.inputs(config, graph)
    normed = norm(graph, given.x, f"{prefix}input_layernorm")
    rotation = Rotation(config.rope, positions)
    head_norm = HeadNorm(norm, HEAD_NORMS) if config.qk_layernorm else None
    attended = blocks.attention(
        graph, given, normed, prefix, config, rotation, head_norm=head_norm, output="self_attn.dense"
    )
    inner = blocks.mlp(graph, normed, f"{prefix}mlp.fc1", f"{prefix}mlp.fc2", config.activation)
    x = graph.add(graph.add(attended, inner), given.x)
    graph.output("output", x, graph.hidden_type)


def post(config: Config, top_k: int, graph: Graph) -> None:
    blocks.post(config, blocks.layer_norm(config.rms_norm_eps), top_k, graph, name=NORM)


FAMILY = Family(
    config=config,
    weights=weights,
    layer=layer,
    post=post,
    reads=blocks.READS | {"layer_norm_eps", "partial_rotary_factor", "qk_layernorm"},
    defaults=DEFAULTS,
)

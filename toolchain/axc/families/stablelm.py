"""StableLM: LayerNorm, a quarter of each head is rotated; attention and MLP one after another or side by side."""

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

# of a key that is absent, as in transformers' class
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 50304,
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "layer_norm_eps": 1e-05,
        "use_qkv_bias": False,
        "qk_layernorm": False,
        "use_parallel_residual": False,
        "partial_rotary_factor": 0.25,
    }
)


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    use_qkv_bias: bool
    use_parallel_residual: bool
    activation: str


def config(reader: Reader) -> Config:
    reader.expect("qk_layernorm", False)
    return Config(
        model_type="stablelm",
        **blocks.decoder(reader, epsilon="layer_norm_eps", partial=True),
        use_qkv_bias=reader.flag("use_qkv_bias"),
        use_parallel_residual=reader.flag("use_parallel_residual"),
        activation=blocks.activation(reader),
    )


def weights(config: Config) -> Sources:
    hidden = config.hidden_size
    norms = ("input_layernorm", *(() if config.use_parallel_residual else ("post_attention_layernorm",)))

    def layer(prefix: str, index: int) -> Sources:
        return {
            **blocks.norm_weights(prefix, hidden, *norms, bias=True),
            **blocks.attention_weights(prefix, config, config.use_qkv_bias),
            **blocks.gated_mlp_weights(prefix, hidden, config.intermediate_size),
        }

    return blocks.decoder_weights(config, layer, norm_bias=True)


def layer(config: Config, index: int, positions: int, graph: Graph) -> None:
    prefix, norm = f"model.layers.{index}.", blocks.layer_norm(config.rms_norm_eps)
    given = blocks.inputs(config, graph)
    normed = norm(graph, given.x, f"{prefix}input_layernorm")
    x = graph.add(given.x, blocks.attention(graph, given, normed, prefix, config, Rotation(config.rope, positions)))
    if not config.use_parallel_residual:
        normed = norm(graph, x, f"{prefix}post_attention_layernorm")
    x = graph.add(x, blocks.gated_mlp(graph, normed, prefix, config.activation))
    graph.output("output", x, graph.hidden_type)


def post(config: Config, top_k: int, graph: Graph) -> None:
    blocks.post(config, blocks.layer_norm(config.rms_norm_eps), top_k, graph)


FAMILY = Family(
    config=config,
    weights=weights,
    layer=layer,
    post=post,
    reads=blocks.READS
    | {"layer_norm_eps", "partial_rotary_factor", "use_qkv_bias", "qk_layernorm", "use_parallel_residual"},
    defaults=DEFAULTS,
)

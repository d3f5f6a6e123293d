"""StableLM: LayerNorm, rotary embedding of a quarter of each head; attention and MLP sequential or parallel.

With qk_layernorm each head of q and k goes through a LayerNorm of its own.
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
from axc.graph import Graph, Value
from axc.weights.sources import Stacked, Stored

# Values of absent keys, as in transformers' config class.
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
    qk_layernorm: bool
    activation: str


@dataclass(frozen=True)
class NormsOfHeads(HeadNorm):
    """LayerNorm without bias; the weights of all heads are one vector."""

    epsilon: float = 0.0

    def __call__(self, graph: Graph, x: Value, name: str, heads: int) -> Value:
        normed = graph.flat(graph.standardized(graph.heads(x, heads), self.epsilon))
        return graph.mul(normed, graph.vector(f"{name}.weight"))


def config(reader: Reader) -> Config:
    return Config(
        model_type="stablelm",
        **blocks.decoder(reader, epsilon="layer_norm_eps", partial=True),
        use_qkv_bias=reader.flag("use_qkv_bias"),
        use_parallel_residual=reader.flag("use_parallel_residual"),
        qk_layernorm=reader.flag("qk_layernorm"),
        activation=blocks.activation(reader),
    )


def weights(config: Config) -> Sources:
    hidden = config.hidden_size
    norms = ("input_layernorm", *(() if config.use_parallel_residual else ("post_attention_layernorm",)))

    def head_norm(name: str, heads: int) -> Sources:
        each = (Stored(f"{name}.norms.{head}.weight", (config.head_dim,)) for head in range(heads))
        return {f"{name}.weight": Stacked(tuple(each))} if config.qk_layernorm else {}

    def layer(prefix: str, index: int) -> Sources:
        return {
            **head_norm(prefix + HEAD_NORMS[0], config.num_attention_heads),
            **head_norm(prefix + HEAD_NORMS[1], config.num_key_value_heads),
            **blocks.norm_weights(prefix, hidden, *norms, bias=True),
            **blocks.attention_weights(prefix, config, config.use_qkv_bias),
            **blocks.gated_mlp_weights(prefix, hidden, config.intermediate_size),
        }

    return blocks.decoder_weights(config, layer, norm_bias=True)


HEAD_NORMS = ("self_attn.q_layernorm", "self_attn.k_layernorm")


def layer(config: Config, index: int, positions: int, graph: Graph) -> None:
    prefix, norm = f"model.layers.{index}.", blocks.layer_norm(config.rms_norm_eps)
    given = blocks.inputs(config, graph)
    normed = norm(graph, given.x, f"{prefix}input_layernorm")
    epsilon, rotation = config.rms_norm_eps, Rotation(config.rope, positions)
    head_norm = NormsOfHeads(norm, HEAD_NORMS, epsilon=epsilon) if config.qk_layernorm else None
    attended = blocks.attention(graph, given, normed, prefix, config, rotation, head_norm=head_norm)
    x = graph.add(given.x, attended)
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

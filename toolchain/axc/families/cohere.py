"""Cohere (Command R, Aya 23): one LayerNorm without bias, then attention and MLP in parallel; scaled logits."""

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
from axc.weights.sources import Stored

# Values of absent keys, as in transformers' config class.
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 256000,
        "hidden_size": 8192,
        "intermediate_size": 22528,
        "num_hidden_layers": 40,
        "num_attention_heads": 64,
        "num_key_value_heads": None,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "layer_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "use_qk_norm": False,
        "logit_scale": 0.0625,
    }
)

# of q and k: a weight of its own for each head
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    attention_bias: bool
    use_qk_norm: bool
    logit_scale: float
    activation: str


@dataclass(frozen=True)
class NormsOfHeads(HeadNorm):
    """LayerNorm of each head with weights [heads, head_dim]."""

    epsilon: float = 0.0

    def __call__(self, graph: Graph, x: Value, name: str, heads: int) -> Value:
        normed = graph.standardized(graph.heads(x, heads), self.epsilon)
        return graph.flat(graph.mul(normed, graph.vector(f"{name}.weight")))


def config(reader: Reader) -> Config:
    return Config(
        model_type="cohere",
        **blocks.decoder(reader, epsilon="layer_norm_eps"),
        **particular(reader),
        use_qk_norm=reader.flag("use_qk_norm", null=False),
    )


def particular(reader: Reader) -> dict[str, Any]:
    """The additional fields of Cohere 2. Raises BadInput."""
    return {
        "attention_bias": reader.flag("attention_bias"),
        "logit_scale": reader.number("logit_scale", low=1e-6, high=1e6),
        "activation": blocks.activation(reader),
    }


def weights(config: Config) -> Sources:
    hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads

    def layer(prefix: str, index: int) -> Sources:
        shapes = zip(HEAD_NORMS, (heads, kv_heads), strict=True) if config.use_qk_norm else ()
        of_heads = {f"{prefix}{name}.weight": (count, config.head_dim) for name, count in shapes}
        return {
            **{name: Stored(name, shape) for name, shape in of_heads.items()},
            **blocks.norm_weights(prefix, hidden, "input_layernorm"),
            **blocks.attention_weights(prefix, config, config.attention_bias, config.attention_bias),
            **blocks.gated_mlp_weights(prefix, hidden, config.intermediate_size),
        }

    return blocks.decoder_weights(config, layer)


def layer(config: Config, index: int, positions: int, graph: Graph) -> None:
    parallel_layer(config, index, Rotation(config.rope, positions, interleaved=True), graph)


def parallel_layer(config: Config, index: int, rotation: Rotation | None, graph: Graph) -> None:
    prefix, norm = f"model.layers.{index}.", blocks.layer_norm(config.rms_norm_eps)
    given = blocks.inputs(config, graph)
    normed = norm(graph, given.x, f"{prefix}input_layernorm")
    head_norm = NormsOfHeads(norm, HEAD_NORMS, epsilon=config.rms_norm_eps) if config.use_qk_norm else None
    x = graph.add(given.x, blocks.attention(graph, given, normed, prefix, config, rotation, head_norm=head_norm))
    x = graph.add(x, blocks.gated_mlp(graph, normed, prefix, config.activation))
    graph.output("output", x, graph.hidden_type)


def post(config: Config, top_k: int, graph: Graph) -> None:
    blocks.post(config, blocks.layer_norm(config.rms_norm_eps), top_k, graph, scale=config.logit_scale)


READS = (blocks.READS - {"rms_norm_eps"}) | {"layer_norm_eps", "attention_bias", "logit_scale"}
FAMILY = Family(
    config=config,
    weights=weights,
    layer=layer,
    post=post,
    reads=READS | {"use_qk_norm"},
    defaults=DEFAULTS,
)

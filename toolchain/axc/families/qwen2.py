"""Qwen2: Qwen1.5, Qwen2 and Qwen2.5. Biases on q, k and v, none elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from axc.config_json import Reader
from axc.config_rope import read_rope
from axc.families import blocks
from axc.families.blocks import Sources
from axc.families.family import Family, ModelConfig
from axc.graph import Graph
from axc.rope import Rope
from axrun.errors import BadInput

# of a key that is absent, as in transformers' Qwen2Config
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
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    }
)


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    intermediate_size: int
    rms_norm_eps: float
    rope: Rope

    @property
    def context(self) -> int:
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)


def config(reader: Reader) -> Config:
    """From a Qwen2 config.json. Raises BadInput."""
    reader.expect("hidden_act", "silu", "swish")
    sizes = blocks.dimensions(reader)
    return Config(
        model_type="qwen2",
        **sizes,
        intermediate_size=reader.integer("intermediate_size"),
        rms_norm_eps=blocks.epsilon(reader),
        rope=read_rope(reader, sizes["max_position_embeddings"]),
        sliding_window=_window(reader),
    )


def _window(reader: Reader) -> int | None:
    """Positions seen by the layers that see fewest; None where all see everything."""
    in_use = reader.flag("use_sliding_window") and reader.get("sliding_window") is not None
    kinds = blocks.sliding_layers(reader)
    if kinds is None:
        layers = reader.integer("num_hidden_layers", high=1024)
        slides = in_use and reader.integer("max_window_layers", low=0) < layers
    else:
        slides = any(kinds)
    if slides and not in_use:
        raise BadInput(f"{reader.path}: layer_types has sliding_attention, but no sliding_window is in use")
    return reader.integer("sliding_window") if slides else None


def weights(config: Config) -> Sources:
    hidden = config.hidden_size

    def layer(prefix: str, index: int) -> Sources:
        return {
            **blocks.vector(f"{prefix}input_layernorm", hidden),
            **blocks.vector(f"{prefix}post_attention_layernorm", hidden),
            **blocks.attention_weights(prefix, config, qkv_bias=True, o_bias=False),
            **blocks.gated_mlp_weights(prefix, hidden, config.intermediate_size, bias=False),
        }

    return blocks.decoder_weights(config, layer)


def layer(config: Config, index: int, positions: int, graph: Graph) -> None:
    prefix, norm = f"model.layers.{index}.", blocks.rms(config.rms_norm_eps)
    given = blocks.inputs(config, graph)
    normed = norm(graph, given.x, f"{prefix}input_layernorm")
    x = graph.add(given.x, blocks.attention(graph, given, normed, prefix, config, config.rope, positions))
    normed = norm(graph, x, f"{prefix}post_attention_layernorm")
    graph.output("output", graph.add(x, blocks.gated_mlp(graph, normed, prefix)), graph.hidden_type)


def post(config: Config, top_k: int, graph: Graph) -> None:
    blocks.post(config, blocks.rms(config.rms_norm_eps), top_k, graph)


FAMILY = Family(
    config=config,
    weights=weights,
    layer=layer,
    post=post,
    reads=blocks.READS | {"use_sliding_window", "max_window_layers"},
    defaults=DEFAULTS,
)

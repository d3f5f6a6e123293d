"""StarCoder2: LayerNorm, biases, an MLP without a gate; all layers have a window if sliding_window is set."""

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

# Values of absent keys, as in transformers' config class.
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 49152,
        "hidden_size": 3072,
        "intermediate_size": 12288,
        "num_hidden_layers": 30,
        "num_attention_heads": 24,
        "num_key_value_heads": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "norm_epsilon": 1e-05,
        "sliding_window": None,
        "use_bias": True,
    }
)


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    use_bias: bool
    activation: str


def config(reader: Reader) -> Config:
    slides = reader.get("sliding_window") is not None
    return Config(
        model_type="starcoder2",
        **blocks.decoder(reader, epsilon="norm_epsilon"),
        **blocks.window(reader, (slides,) * reader.integer("num_hidden_layers", high=1024)),
        use_bias=reader.flag("use_bias"),
        activation=blocks.activation(reader),
    )


def weights(config: Config) -> Sources:
    hidden, inner, bias = config.hidden_size, config.intermediate_size, config.use_bias

    def layer(prefix: str, index: int) -> Sources:
        return {
            **blocks.norm_weights(prefix, hidden, "input_layernorm", "post_attention_layernorm", bias=True),
            **blocks.attention_weights(prefix, config, bias, bias),
            **blocks.matrix(f"{prefix}mlp.c_fc", inner, hidden, bias),
            **blocks.matrix(f"{prefix}mlp.c_proj", hidden, inner, bias),
        }

    return blocks.decoder_weights(config, layer, norm_bias=True)


def layer(config: Config, index: int, positions: int, graph: Graph) -> None:
    prefix, norm = f"model.layers.{index}.", blocks.layer_norm(config.rms_norm_eps)
    given = blocks.inputs(config, graph)
    normed = norm(graph, given.x, f"{prefix}input_layernorm")
    x = graph.add(given.x, blocks.attention(graph, given, normed, prefix, config, Rotation(config.rope, positions)))
    normed = norm(graph, x, f"{prefix}post_attention_layernorm")
    inner = blocks.mlp(graph, normed, f"{prefix}mlp.c_fc", f"{prefix}mlp.c_proj", config.activation)
    graph.output("output", graph.add(x, inner), graph.hidden_type)


def post(config: Config, top_k: int, graph: Graph) -> None:
    blocks.post(config, blocks.layer_norm(config.rms_norm_eps), top_k, graph)


FAMILY = Family(
    config=config,
    weights=weights,
    layer=layer,
    post=post,
    reads=blocks.READS | {"sliding_window", "norm_epsilon", "use_bias"},
    defaults=DEFAULTS,
    keeps=blocks.keeps,
)

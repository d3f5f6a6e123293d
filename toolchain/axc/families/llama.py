"""Llama: Llama 2, 3 and 3.2, TinyLlama, SmolLM. Biases only where config.json asks for them.

Some other architectures compute the same where their config.json says so: KIN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from axc.config_json import Reader
from axc.config_rope import read_rope
from axc.families import blocks
from axc.families.blocks import Sources
from axc.families.family import Family, Kin, ModelConfig
from axc.graph import Graph
from axc.rope import Rope
from axrun.errors import BadInput

# of a key that is absent, as in transformers' LlamaConfig
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
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": None,
    }
)


# compute differently although their tensors, and every key of their config.json, could be a Llama's
DIFFERENT: Mapping[str, str] = MappingProxyType(
    {
        "ernie4_5": "it rotates neighbouring elements of a head, Llama those half a head apart",
        "helium": "it rotates neighbouring elements of a head, Llama those half a head apart",
        "gemma": "it scales the embedding and adds 1 to the weights of its norms",
    }
)


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """Every layer sees everything, but transformers' cache slides by a `sliding_window`: that bounds the context."""

    intermediate_size: int
    rms_norm_eps: float
    rope: Rope
    attention_bias: bool
    mlp_bias: bool

    @property
    def context(self) -> int:
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)


def config(reader: Reader) -> Config:
    """From a Llama config.json. Raises BadInput."""
    reader.expect("hidden_act", "silu", "swish")
    sizes = blocks.dimensions(reader)
    return Config(
        model_type="llama",
        **sizes,
        intermediate_size=reader.integer("intermediate_size"),
        rms_norm_eps=blocks.epsilon(reader),
        rope=read_rope(reader, sizes["max_position_embeddings"]),
        attention_bias=reader.flag("attention_bias"),
        mlp_bias=reader.flag("mlp_bias"),
        sliding_window=_window(reader),
    )


def _window(reader: Reader) -> int | None:
    """Llama's own layers see everything, but transformers' cache would slide by a `sliding_window`; Mistral's do."""
    slides, window = blocks.sliding_layers(reader), reader.get("sliding_window")
    if slides and any(slides) and window is None:
        raise BadInput(f"{reader.path}: layer_types has sliding_attention, but there is no sliding_window")
    return None if window is None or (slides and not any(slides)) else reader.integer("sliding_window")


def weights(config: Config) -> Sources:
    hidden = config.hidden_size

    def layer(prefix: str, index: int) -> Sources:
        return {
            **blocks.vector(f"{prefix}input_layernorm", hidden),
            **blocks.vector(f"{prefix}post_attention_layernorm", hidden),
            **blocks.attention_weights(prefix, config, config.attention_bias, config.attention_bias),
            **blocks.gated_mlp_weights(prefix, hidden, config.intermediate_size, config.mlp_bias),
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


def _smollm3(reader: Reader) -> dict[str, Any]:
    """Every layer rotates; a window is in use only where layer_types says so."""
    values, layers = dict(reader.values), reader.integer("num_hidden_layers", high=1024)
    rotates, interval = values.pop("no_rope_layers", None), values.pop("no_rope_layer_interval", 4)
    if rotates is None:
        rotates = [int(bool((index + 1) % interval)) for index in range(layers)] if interval else [1] * layers
    if not isinstance(rotates, list) or len(rotates) != layers or any(one != 1 for one in rotates):
        raise BadInput(
            f"{reader.path}: no_rope_layers is {rotates!r:.60}: layers without rotary embedding are no Llama's"
        )
    if not (values.pop("use_sliding_window", False) and any(blocks.sliding_layers(reader) or ())):
        values.update(sliding_window=None, layer_types=None)
    return values


def _granite(reader: Reader) -> dict[str, Any]:
    """Its four multipliers must be what Llama has: 1, and 1 / sqrt(head_dim) for attention."""
    values = dict(reader.values)
    head_dim = reader.head_dim(reader.integer("hidden_size"), reader.integer("num_attention_heads"))
    for key in ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier"):
        value = reader.number(key, low=0, high=1e6)
        llamas = 1.0 if key != "attention_multiplier" else 1 / math.sqrt(head_dim)
        if not math.isclose(value, llamas, rel_tol=1e-7):
            raise BadInput(f"{reader.path}: {key} is {value:g}; Llama's is {llamas:g}")
        values.pop(key, None)
    return values


_MISTRAL = {
    **DEFAULTS,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
KIN: Mapping[str, Kin] = MappingProxyType(
    {
        "mistral": Kin(_MISTRAL, lambda reader: dict(reader.values)),
        "ministral": Kin(_MISTRAL, lambda reader: dict(reader.values)),
        "smollm3": Kin(
            {
                **DEFAULTS,
                "vocab_size": 128256,
                "hidden_size": 2048,
                "num_hidden_layers": 36,
                "num_attention_heads": 16,
                "num_key_value_heads": 4,
                "max_position_embeddings": 32768,
                "rope_theta": 2e6,
                "tie_word_embeddings": True,
            },
            _smollm3,
        ),
        "granite": Kin(
            {
                **DEFAULTS,
                "embedding_multiplier": 1.0,
                "residual_multiplier": 1.0,
                "logits_scaling": 1.0,
                "attention_multiplier": 1.0,
            },
            _granite,
        ),
    }
)
FAMILY = Family(
    config=config,
    weights=weights,
    layer=layer,
    post=post,
    reads=blocks.READS | {"attention_bias", "mlp_bias"},
    defaults=DEFAULTS,
    kin=KIN,
    different=DIFFERENT,
)

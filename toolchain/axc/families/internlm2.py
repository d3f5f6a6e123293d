"""InternLM2 and InternLM2.5: Llama with other tensor names, and q, k and v interleaved by group in one matrix.

The model code is in its repository (modeling_internlm2.py), not in transformers; keys without a known default are
required.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from axc.config_json import Reader
from axc.families import blocks
from axc.families.blocks import DecoderConfig, Rotation, Sources
from axc.families.family import Family
from axc.graph import Graph
from axc.stored import EMBEDDING, HEAD
from axc.weights.sources import Gathered, Stored

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {"hidden_act": "silu", "num_key_value_heads": None, "rope_theta": 10000.0, "bias": False}
)


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    bias: bool


def config(reader: Reader) -> Config:
    reader.expect("hidden_act", "silu", "swish")
    return Config(model_type="internlm2", **blocks.decoder(reader), bias=reader.flag("bias"))


def weights(config: Config) -> Sources:
    """The fused matrix has, for each group of query heads that share a key: the queries, the key, the value."""
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    groups, heads = config.num_key_value_heads, config.num_attention_heads
    rows = np.arange((heads + 2 * groups) * head).reshape(groups, -1, head)
    parts = {"q": rows[:, :-2], "k": rows[:, -2], "v": rows[:, -1]}

    def layer(prefix: str, index: int) -> Sources:
        fused = {"weight": (rows.size, hidden), **({"bias": (rows.size,)} if config.bias else {})}
        found: Sources = {
            f"{prefix}self_attn.{part}_proj.{kind}": Gathered(
                Stored(f"{prefix}attention.wqkv.{kind}", shape), order.reshape(-1)
            )
            for kind, shape in fused.items()
            for part, order in parts.items()
        }
        others = {
            "input_layernorm": ("attention_norm", (hidden,)),
            "post_attention_layernorm": ("ffn_norm", (hidden,)),
            "self_attn.o_proj": ("attention.wo", (hidden, heads * head)),
            "mlp.gate_proj": ("feed_forward.w1", (inner, hidden)),
            "mlp.up_proj": ("feed_forward.w3", (inner, hidden)),
            "mlp.down_proj": ("feed_forward.w2", (hidden, inner)),
        }
        for name, (stored, shape) in others.items():
            found[f"{prefix}{name}.weight"] = Stored(f"{prefix}{stored}.weight", shape)
        if config.bias:
            found[f"{prefix}self_attn.o_proj.bias"] = Stored(f"{prefix}attention.wo.bias", (hidden,))
        return found

    found = blocks.decoder_weights(config, layer)
    found[EMBEDDING] = Stored("model.tok_embeddings.weight", (config.vocab_size, hidden))
    if not config.tie_word_embeddings:
        found[HEAD] = Stored("output.weight", (config.vocab_size, hidden))
    return found


def layer(config: Config, index: int, positions: int, graph: Graph) -> None:
    blocks.pre_norm_layer(graph, config, index, Rotation(config.rope, positions))


def twin(config: Config) -> dict[str, Any]:
    return blocks.written_decoder(config, model_type="llama", attention_bias=config.bias, mlp_bias=False)


FAMILY = Family(
    config=config,
    weights=weights,
    layer=layer,
    post=blocks.post_rms,
    reads=blocks.READS | {"bias"},
    defaults=DEFAULTS,
    twin=twin,
)

"""ChatGLM3 and GLM-4 checkpoints in the original format: GLM with other tensor names, and q, k and v in one matrix.

The model code is in its repository (modeling_chatglm.py), not in transformers; keys without a known default are
required.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from axc.config_json import Reader
from axc.families import blocks, glm
from axc.families.blocks import Sources
from axc.families.glm import Config
from axc.rope import Rope
from axc.stored import EMBEDDING, HEAD
from axc.weights.sources import Stored, split
from axrun.errors import BadInput

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "tie_word_embeddings": False,
        "rope_ratio": 1.0,
        "rmsnorm": True,
        "post_layer_norm": True,
        "add_bias_linear": False,
        "apply_residual_connection_post_layernorm": False,
        "multi_query_attention": True,
        "original_rope": True,
    }
)
# Keys with the only supported value.
ONLY = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "original_rope": True,
    "multi_query_attention": True,
}
BASE = 10000.0  # rope base, multiplied by rope_ratio
READS = frozenset(
    {
        "hidden_size",
        "ffn_hidden_size",
        "num_layers",
        "num_attention_heads",
        "multi_query_group_num",
        "kv_channels",
        "padded_vocab_size",
        "seq_length",
        "layernorm_epsilon",
        "tie_word_embeddings",
        "add_qkv_bias",
        "rope_ratio",
        *ONLY,
    }
)


def config(reader: Reader) -> Config:
    for key, value in ONLY.items():
        if reader.flag(key) is not value:
            raise BadInput(f"{reader.path}: {key} is {not value}; this architecture is built with {value} only")
    heads, head_dim = reader.integer("num_attention_heads"), reader.integer("kv_channels", low=4)
    if head_dim % 4:
        raise BadInput(f"{reader.path}: kv_channels is {head_dim}; expected a multiple of 4: half of a head is rotated")
    return Config(
        model_type="chatglm",
        hidden_size=reader.integer("hidden_size"),
        intermediate_size=reader.integer("ffn_hidden_size"),
        num_hidden_layers=reader.integer("num_layers", high=1024),
        num_attention_heads=heads,
        num_key_value_heads=reader.divisor("multi_query_group_num", heads),
        head_dim=head_dim,
        vocab_size=reader.integer("padded_vocab_size"),
        max_position_embeddings=reader.integer("seq_length"),
        rms_norm_eps=reader.number("layernorm_epsilon", low=1e-12, high=1),
        rope=Rope(BASE * reader.number("rope_ratio", low=1e-3, high=1e9), partial=0.5),
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        attention_bias=reader.flag("add_qkv_bias"),
    )


def weights(config: Config) -> Sources:
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv = config.num_attention_heads * config.head_dim, config.kv_size
    qkv, kinds = heads + 2 * kv, ["weight", *(["bias"] if config.attention_bias else [])]

    def layer(prefix: str, index: int) -> Sources:
        stored = f"transformer.encoder.layers.{index}."
        found: Sources = {}
        for kind in kinds:
            shape = (qkv, hidden) if kind == "weight" else (qkv,)
            whole = Stored(f"{stored}self_attention.query_key_value.{kind}", shape)
            for part, source in zip("qkv", split(whole, heads, kv, kv), strict=True):
                found[f"{prefix}self_attn.{part}_proj.{kind}"] = source
        up = split(Stored(f"{stored}mlp.dense_h_to_4h.weight", (2 * inner, hidden)), inner, inner)
        return {
            **found,
            f"{prefix}input_layernorm.weight": Stored(f"{stored}input_layernorm.weight", (hidden,)),
            f"{prefix}post_attention_layernorm.weight": Stored(f"{stored}post_attention_layernorm.weight", (hidden,)),
            f"{prefix}self_attn.o_proj.weight": Stored(f"{stored}self_attention.dense.weight", (hidden, heads)),
            f"{prefix}mlp.gate_proj.weight": up[0],
            f"{prefix}mlp.up_proj.weight": up[1],
            f"{prefix}mlp.down_proj.weight": Stored(f"{stored}mlp.dense_4h_to_h.weight", (hidden, inner)),
        }

    found = blocks.decoder_weights(config, layer)
    found[EMBEDDING] = Stored("transformer.embedding.word_embeddings.weight", (config.vocab_size, hidden))
    found["model.norm.weight"] = Stored("transformer.encoder.final_layernorm.weight", (hidden,))
    if not config.tie_word_embeddings:
        found[HEAD] = Stored("transformer.output_layer.weight", (config.vocab_size, hidden))
    return found


def twin(config: Config) -> dict[str, Any]:
    return blocks.written_decoder(config, model_type="glm", attention_bias=config.attention_bias)


FAMILY = dataclasses.replace(
    glm.FAMILY,
    config=config,
    weights=weights,
    reads=READS,
    defaults=DEFAULTS,
    redundant=("rotary_pos_emb.inv_freq",),
    twin=twin,
)

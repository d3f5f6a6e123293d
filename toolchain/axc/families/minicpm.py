"""MiniCPM and MiniCPM4: Granite with multipliers derived from scale_emb, scale_depth and dim_model_base.

The model code is in its repository (modeling_minicpm.py), not in transformers; keys without a known default are
required.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from axc.config_json import Reader
from axc.families import blocks, granite
from axc.families.family import Family

# Values of absent keys, as in transformers' config class.
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_act": "silu",
        "num_key_value_heads": None,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": True,
        "attention_bias": False,
    }
)


Config = granite.Config


def config(reader: Reader) -> Config:
    reader.expect("hidden_act", "silu", "swish")
    fields = blocks.decoder(reader)
    depth = reader.number("scale_depth", low=1e-6, high=1e6)
    return Config(
        model_type="minicpm",
        **fields,
        attention_bias=reader.flag("attention_bias"),
        mlp_bias=False,
        embedding_multiplier=reader.number("scale_emb", low=1e-6, high=1e6),
        residual_multiplier=depth / math.sqrt(fields["num_hidden_layers"]),
        attention_multiplier=None,
        logits_scaling=fields["hidden_size"] / reader.integer("dim_model_base"),
    )


weights, layer, post = granite.weights, granite.layer, granite.post


def twin(config: Config) -> dict[str, Any]:
    return blocks.written_decoder(
        config,
        model_type="granite",
        attention_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        embedding_multiplier=config.embedding_multiplier,
        residual_multiplier=config.residual_multiplier,
        attention_multiplier=config.head_dim**-0.5,
        logits_scaling=config.logits_scaling,
    )


FAMILY = Family(
    config=config,
    weights=weights,
    layer=layer,
    post=post,
    reads=blocks.READS | {"attention_bias", "scale_emb", "scale_depth", "dim_model_base"},
    defaults=DEFAULTS,
    twin=twin,
)

"""InternLM3: Llama under another model_type; qkv_bias and bias are refused if true."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from axc.config_json import Reader
from axc.families import llama
from axc.families.llama import Config

# Values of absent keys, as in transformers' config class.
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        **llama.DEFAULTS,
        "vocab_size": 128512,
        "intermediate_size": 10240,
        "num_hidden_layers": 48,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "qkv_bias": False,
        "bias": False,
    }
)


def config(reader: Reader) -> Config:
    reader.expect("qkv_bias", False)
    reader.expect("bias", False)
    return dataclasses.replace(llama.config(reader), model_type="internlm3")


FAMILY = dataclasses.replace(
    llama.FAMILY,
    config=config,
    reads=llama.FAMILY.reads | {"qkv_bias", "bias"},
    defaults=DEFAULTS,
    foreign=False,
    different={},
    gguf=None,
)

"""The text model of Qwen2-VL: Qwen2 with other defaults. Its three position ids are equal for text: the plain rope."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from axc.families import qwen2
from axc.families.family import Inside

# Values of absent keys, as in transformers' config class.
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        **qwen2.DEFAULTS,
        "vocab_size": 152064,
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "max_window_layers": 80,
    }
)

FAMILY = dataclasses.replace(
    qwen2.FAMILY,
    config=lambda reader: qwen2.read(reader, "qwen2_vl_text"),
    defaults=DEFAULTS,
    foreign=False,
    gguf=None,
    inside={"qwen2_vl": Inside(flat=True, mrope=True)},
)

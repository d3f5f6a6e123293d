"""The text model of Qwen3-VL: Qwen3 with other defaults and no windows. Its three position ids are equal for text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from axc.config_json import Reader
from axc.families import blocks, qwen3
from axc.families.family import Inside
from axc.families.qwen3 import Config

WINDOWS = blocks.WINDOW | {"use_sliding_window", "max_window_layers"}
# Values of absent keys, as in transformers' config class.
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        **{key: value for key, value in qwen3.DEFAULTS.items() if key not in WINDOWS},
        "use_sliding_window": False,
        "max_position_embeddings": 128000,
        "rope_theta": 500000.0,
    }
)


def config(reader: Reader) -> Config:
    values = {key: value for key, value in reader.values.items() if key not in WINDOWS}
    return qwen3.read(Reader(values, reader.path, reader.defaults), "qwen3_vl_text")


FAMILY = dataclasses.replace(
    qwen3.FAMILY,
    config=config,
    defaults=DEFAULTS,
    reads=qwen3.FAMILY.reads - WINDOWS,
    gguf=None,
    inside={"qwen3_vl": Inside(mrope=True)},
)

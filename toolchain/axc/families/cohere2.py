"""Cohere 2 (Command R7B, Command A): Cohere with windows; layers without a window have no rotary embedding."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from axc.config_json import Reader
from axc.families import blocks, cohere
from axc.families.blocks import Rotation
from axc.families.cohere import Config
from axc.graph import Graph

# Values of absent keys, as in transformers' config class.
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        **{key: value for key, value in cohere.DEFAULTS.items() if key not in ("use_qk_norm", "rope_theta")},
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
    }
)


def config(reader: Reader) -> Config:
    layers, pattern = reader.integer("num_hidden_layers", high=1024), reader.integer("sliding_window_pattern")
    kinds = blocks.sliding_layers(reader) or tuple(bool((index + 1) % pattern) for index in range(layers))
    fields = {**blocks.decoder(reader, epsilon="layer_norm_eps"), **blocks.window(reader, kinds)}
    return Config(model_type="cohere2", **fields, **cohere.particular(reader), use_qk_norm=False)


def layer(config: Config, index: int, positions: int, graph: Graph) -> None:
    slides = config.sliding and config.sliding[index]
    rotation = Rotation(config.rope, positions, interleaved=True) if slides else None
    cohere.parallel_layer(config, index, rotation, graph)


FAMILY = dataclasses.replace(
    cohere.FAMILY,
    config=config,
    layer=layer,
    keeps=blocks.keeps,
    reads=cohere.READS | blocks.WINDOW | {"sliding_window_pattern"},
    defaults=DEFAULTS,
)

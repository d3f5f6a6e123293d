"""OLMo 3: OLMo 2 with windows in three of four layers, and another rope in those."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from axc.config_json import Reader
from axc.config_rope import rope_by_layer_type
from axc.families import blocks, olmo2
from axc.families.blocks import HeadNorm, Rotation
from axc.families.family import Family
from axc.graph import Graph
from axc.rope import Rope

PATTERN = 4  # without layer_types, every fourth layer has full attention
THETA = 500000.0  # where windows are, whatever rope_theta is (`Olmo3Config.convert_rope_params_to_dict`)
# Values of absent keys, as in transformers' config class.
DEFAULTS: Mapping[str, Any] = MappingProxyType({**olmo2.DEFAULTS, "rope_theta": THETA, "sliding_window": 4096})


@dataclass(frozen=True, kw_only=True)
class Config(olmo2.Config):
    local_rope: Rope  # of the layers that have windows


def config(reader: Reader) -> Config:
    reader.expect("hidden_act", "silu", "swish")
    layers = reader.integer("num_hidden_layers", high=1024)
    kinds = blocks.sliding_layers(reader) or tuple(bool((index + 1) % PATTERN) for index in range(layers))
    fields = blocks.decoder(blocks.without_ropes(reader))
    size, head_dim = fields["max_position_embeddings"], fields["head_dim"]
    fields["rope"] = rope_by_layer_type(reader, "full_attention", "rope_theta", size, head_dim)
    inner = Reader({**reader.values, "rope_theta": THETA}, reader.path, reader.defaults)
    return Config(
        model_type="olmo3",
        **fields,
        **blocks.window(reader, kinds),
        attention_bias=reader.flag("attention_bias"),
        local_rope=rope_by_layer_type(inner, "sliding_attention", "rope_theta", size, head_dim),
    )


def layer(config: Config, index: int, positions: int, graph: Graph) -> None:
    rotation = Rotation(config.local_rope if config.sliding and config.sliding[index] else config.rope, positions)
    blocks.post_norm_layer(graph, config, index, rotation, HeadNorm(blocks.rms(config.rms_norm_eps), whole=True))


FAMILY = Family(
    config=config,
    weights=olmo2.weights,
    layer=layer,
    post=blocks.post_rms,
    reads=olmo2.FAMILY.reads | blocks.WINDOW,
    defaults=DEFAULTS,
    keeps=blocks.keeps,
)

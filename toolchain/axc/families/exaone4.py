"""EXAONE 4: norms after attention and MLP, norms of each head; if some layers have windows, only those use RoPE."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from axc.config_json import Reader
from axc.families import blocks
from axc.families.blocks import DecoderConfig, HeadNorm, Rotation, Sources
from axc.families.family import Family
from axc.graph import Graph
from axrun.errors import BadInput

# Values of absent keys, as in transformers' config class.
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 102400,
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
    }
)


Config = DecoderConfig


def config(reader: Reader) -> Config:
    reader.expect("hidden_act", "silu", "swish")
    windows, kinds = reader.get("sliding_window") is not None, blocks.sliding_layers(reader)
    if kinds is None:
        layers, pattern = reader.integer("num_hidden_layers", high=1024), reader.get("sliding_window_pattern")
        every = _pattern(reader, pattern) if windows else 0
        kinds = tuple(bool(every) and bool((index + 1) % every) for index in range(layers))
    fields: dict[str, Any] = {"sliding": kinds, "sliding_window": reader.integer("sliding_window")} if windows else {}
    if any(kinds) and not windows:
        raise BadInput(f"{reader.path}: layer_types has sliding_attention, but there is no sliding_window")
    return Config(model_type="exaone4", **blocks.decoder(reader), **fields)


def _pattern(reader: Reader, pattern: Any) -> int:
    """The interval of layers with full attention; older files have letters such as LLLG."""
    if isinstance(pattern, str) and pattern and pattern == "L" * (len(pattern) - 1) + "G":
        return len(pattern)
    return reader.integer("sliding_window_pattern", high=1024)


def weights(config: Config) -> Sources:
    hidden = config.hidden_size

    def layer(prefix: str, index: int) -> Sources:
        return {
            **blocks.norm_weights(prefix, hidden, "post_attention_layernorm", "post_feedforward_layernorm"),
            **blocks.attention_weights(prefix, config),
            **blocks.norm_weights(prefix, config.head_dim, "self_attn.q_norm", "self_attn.k_norm"),
            **blocks.gated_mlp_weights(prefix, hidden, config.intermediate_size),
        }

    return blocks.decoder_weights(config, layer)


def layer(config: Config, index: int, positions: int, graph: Graph) -> None:
    rotates = config.sliding_window is None or config.sliding[index]
    rotation = Rotation(config.rope, positions) if rotates else None
    blocks.post_norm_layer(graph, config, index, rotation, HeadNorm(blocks.rms(config.rms_norm_eps)))


post = blocks.post_rms


FAMILY = Family(
    config=config,
    weights=weights,
    layer=layer,
    post=post,
    reads=blocks.READS | blocks.WINDOW | {"sliding_window_pattern"},
    defaults=DEFAULTS,
    keeps=blocks.keeps,
)

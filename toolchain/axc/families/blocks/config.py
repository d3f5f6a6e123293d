"""What decoders share in config.json: keys, their types and bounds, and the fields that they become."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from axc.config_json import Reader
from axc.config_rope import PARTIAL, ROPE_KEYS, read_rope, written
from axc.families.family import Keeps, ModelConfig
from axc.rope import Rope
from axrun.errors import BadInput

# Keys of config.json that every decoder has.
READS = ROPE_KEYS | {
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
}
WINDOW = frozenset(("sliding_window", "layer_types"))  # keys of decoders with sliding-window attention
LAYER_TYPES = {"full_attention": False, "attention": False, "sliding_attention": True}  # value: has a window


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(ModelConfig):
    """The config of the decoders here. `sliding`: for each layer, whether its attention is limited to the window."""

    intermediate_size: int
    rms_norm_eps: float
    rope: Rope
    sliding: tuple[bool, ...] = ()


def decoder(reader: Reader, *, epsilon: str | float = "rms_norm_eps", partial: bool = False) -> dict[str, Any]:
    """The fields of DecoderConfig but `sliding` and the window. Raises BadInput.

    `epsilon` is the key of the norms' epsilon, or its value where no key has it; `partial`: the architecture reads
    partial_rotary_factor.
    """
    heads, hidden = reader.integer("num_attention_heads"), reader.integer("hidden_size")
    positions, head_dim = reader.integer("max_position_embeddings"), reader.head_dim(hidden, heads)
    return {
        "hidden_size": hidden,
        "intermediate_size": reader.integer("intermediate_size"),
        "num_hidden_layers": reader.integer("num_hidden_layers", high=1024),
        "num_attention_heads": heads,
        "num_key_value_heads": reader.divisor("num_key_value_heads", heads),
        "head_dim": head_dim,
        "vocab_size": reader.integer("vocab_size"),
        "max_position_embeddings": positions,
        "rms_norm_eps": epsilon if isinstance(epsilon, float) else reader.number(epsilon, low=1e-12, high=1),
        "rope": read_rope(reader, positions, head_dim, partial=partial),
        "tie_word_embeddings": reader.flag("tie_word_embeddings"),
    }


def written_decoder(config: DecoderConfig, **more: Any) -> dict[str, Any]:
    """config.json of a decoder without windows, from which `decoder` reads these fields; with the keys `more`."""
    same = READS - ROPE_KEYS - {"hidden_act"}
    return {
        **{key: getattr(config, key) for key in sorted(same)},
        "hidden_act": "silu",
        "rope_parameters": written(config.rope),
        PARTIAL: config.rope.partial,
        **{f"{token}_token_id": None for token in ("bos", "eos", "pad")},  # some defaults are beyond the vocabulary
        **more,
    }


def without_ropes(reader: Reader) -> Reader:
    """For `decoder`, which knows one rope for all layers; `rope_by_layer_type` reads those of each type."""
    plain = {"rope_scaling": None, "rope_parameters": None, "rope_theta": reader.get("rope_theta")}
    return Reader({**reader.values, **plain}, reader.path, reader.defaults)


def keeps(config: DecoderConfig, index: int) -> Keeps:
    """The window of a layer, according to `sliding`."""
    return Keeps(config.sliding_window if config.sliding and config.sliding[index] else None)


def window(reader: Reader, sliding: tuple[bool, ...]) -> dict[str, Any]:
    """The fields `sliding` and `sliding_window`; none if no layer has a window. Raises BadInput."""
    if not any(sliding):
        return {}
    if reader.get("sliding_window") is None:
        raise BadInput(f"{reader.path}: layer_types has sliding_attention, but there is no sliding_window")
    return {"sliding": sliding, "sliding_window": reader.integer("sliding_window")}


# Values of hidden_act, and the activation that computes them.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu tanh",
    "gelu_pytorch_tanh": "gelu tanh",
    "gelu_fast": "gelu tanh",
    "relu": "relu",
    "relu2": "relu squared",
}


def activation(reader: Reader, key: str = "hidden_act") -> str:
    """One of `silu`, `gelu`, `gelu tanh`, `relu`, `relu squared`. Raises BadInput."""
    value = reader.get(key)
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise BadInput(f"{reader.path}: {key} is {value!r:.60}; expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[value]


def sliding_layers(reader: Reader) -> tuple[bool, ...] | None:
    """Which layers have a window according to `layer_types`; None without that key. Raises BadInput."""
    kinds = reader.values.get("layer_types")
    if kinds is None:
        return None
    layers = reader.integer("num_hidden_layers", high=1024)
    if not isinstance(kinds, list) or not all(isinstance(kind, str) and kind in LAYER_TYPES for kind in kinds):
        raise BadInput(
            f"{reader.path}: layer_types is {kinds!r:.60}; expected {' or '.join(LAYER_TYPES)} for each layer"
        )
    if len(kinds) != layers:
        raise BadInput(f"{reader.path}: layer_types has {len(kinds)} entries; expected num_hidden_layers {layers}")
    return tuple(LAYER_TYPES[kind] for kind in kinds)

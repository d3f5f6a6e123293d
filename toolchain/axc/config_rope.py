"""The keys of config.json that describe rotary position embedding, in the spellings of transformers 4 and 5."""

from __future__ import annotations

from axc.config_json import Reader
from axc.rope import Rope
from axrun.errors import BadInput

ROPE_KEYS = frozenset(("rope_theta", "rope_parameters", "rope_scaling", "partial_rotary_factor"))
ORIGINAL_LENGTH = "original_max_position_embeddings"
_PLAIN = frozenset(("rope_type", "type", "rope_theta", "partial_rotary_factor"))
# what is read inside of rope_parameters, by kind of rope
NESTED_ROPE_KEYS = {
    "default": _PLAIN,
    "linear": _PLAIN | {"factor"},
    "llama3": _PLAIN | {"factor", "low_freq_factor", "high_freq_factor", ORIGINAL_LENGTH},
}


def read_rope(reader: Reader, positions: int) -> Rope:
    """Rope from `rope_scaling` or else `rope_parameters`, and from keys beside them: transformers 5's order.

    (`RotaryEmbeddingConfigMixin.convert_rope_params_to_dict`.) `positions` is max_position_embeddings.
    """
    where = "rope_scaling" if reader.values.get("rope_scaling") else "rope_parameters"
    nested = reader.values.get(where) or {}
    if not isinstance(nested, dict):
        raise BadInput(f"{reader.path}: {where} is {nested!r:.60}; expected an object")
    if any(isinstance(value, dict) for value in nested.values()):
        raise BadInput(f"{reader.path}: {where} differs from layer to layer; this architecture is built with one only")
    inner = Reader(
        nested,
        reader.path,
        {
            "rope_theta": reader.get("rope_theta") if "rope_theta" not in nested else None,
            ORIGINAL_LENGTH: positions,
        },
    )
    theta = inner.number("rope_theta", low=1, high=1e15)
    if ORIGINAL_LENGTH in reader.values:  # `standardize_rope_params` prefers what stands beside the rope's own keys
        inner.values = {**nested, ORIGINAL_LENGTH: reader.values[ORIGINAL_LENGTH]}
    if nested.get("partial_rotary_factor", 1) not in (1, None):
        raise BadInput(f"{reader.path}: partial_rotary_factor is {nested['partial_rotary_factor']!r:.60}; expected 1")
    kind = nested.get("rope_type", nested.get("type", "default"))
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, inner.number("factor", low=1e-3, high=1e6))
    if kind == "llama3":
        return Rope(
            theta,
            kind,
            inner.number("factor", low=1e-3, high=1e6),
            inner.number("low_freq_factor", low=1e-3, high=1e6),
            inner.number("high_freq_factor", low=1e-3, high=1e6),
            inner.integer(ORIGINAL_LENGTH),
        )
    raise BadInput(f"{reader.path}: rope type {kind!r:.60} is not known; expected default, linear or llama3")

"""The keys of config.json that describe rotary position embedding, in the spellings of transformers 4 and 5."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from axc.config_json import Reader
from axc.rope import Rope, logarithm
from axrun.errors import BadInput

ROPE_KEYS = frozenset(("rope_theta", "rope_parameters", "rope_scaling"))
ORIGINAL_LENGTH = "original_max_position_embeddings"
PARTIAL = "partial_rotary_factor"
_PLAIN = frozenset(("rope_type", "type", "rope_theta", PARTIAL))
# The keys read within rope_parameters, by rope type.
NESTED_ROPE_KEYS = {
    "default": _PLAIN,
    "linear": _PLAIN | {"factor"},
    "llama3": _PLAIN | {"factor", "low_freq_factor", "high_freq_factor", ORIGINAL_LENGTH},
    "dynamic": _PLAIN | {"factor", ORIGINAL_LENGTH},
    "yarn": _PLAIN
    | {"factor", ORIGINAL_LENGTH, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "longrope": _PLAIN | {"factor", ORIGINAL_LENGTH, "attention_factor", "short_factor", "long_factor"},
}


def read_rope(reader: Reader, positions: int, head_dim: int, *, partial: bool = False) -> Rope:
    """The rope of `rope_scaling`, or else of `rope_parameters`, and of top-level keys; precedence as in transformers 5.

    See `RotaryEmbeddingConfigMixin.convert_rope_params_to_dict`. `positions` is max_position_embeddings. `partial`: the
    architecture reads partial_rotary_factor. Raises BadInput.
    """
    scaling, parameters = (an_object(reader, key) for key in ("rope_scaling", "rope_parameters"))
    where, nested = ("rope_scaling", scaling) if scaling else ("rope_parameters", parameters)
    if any(isinstance(value, dict) for value in nested.values()):
        raise BadInput(f"{reader.path}: {where} differs between layers; this architecture has one for all layers")
    theta = reader.get("rope_theta") if "rope_theta" not in nested else None
    return rope_of(reader, nested, theta, positions, head_dim, partial=partial)


def an_object(reader: Reader, key: str) -> dict[str, Any]:
    """That a key holds; empty where it is absent or null. Raises BadInput."""
    value = reader.values.get(key)
    if value is not None and not isinstance(value, dict):
        raise BadInput(f"{reader.path}: {key} is {value!r:.60}; expected an object")
    return value or {}


BY_LAYER_TYPE = frozenset(("full_attention", "sliding_attention"))


def written(rope: Rope) -> dict[str, Any]:
    """rope_parameters of config.json, from which `read_rope` reads this rope."""
    keys = NESTED_ROPE_KEYS[rope.kind] - {"type", "mscale", "mscale_all_dim", "short_factor", "long_factor"}
    values = {key: getattr(rope, key) for key in sorted(keys - _PLAIN)}
    if rope.kind == "longrope":
        values |= {"short_factor": list(rope.divisors), "long_factor": list(rope.long_divisors)}
    return {"rope_type": rope.kind, "rope_theta": rope.theta, PARTIAL: rope.partial, **values}


def rope_by_layer_type(reader: Reader, kind: str, theta: str, positions: int, head_dim: int) -> Rope:
    """The rope of a layer type, from rope_parameters; `theta` is the key of its base if that has none.

    The older key rope_scaling applies to layers with full attention. Raises BadInput.
    """
    scaling, nested = (an_object(reader, key) for key in ("rope_scaling", "rope_parameters"))
    own = nested.get(kind)
    if own is not None and not isinstance(own, dict):
        raise BadInput(f"{reader.path}: rope_parameters.{kind} is {own!r:.60}; expected an object")
    own = own or {}
    if set(nested) - BY_LAYER_TYPE:
        odd = ", ".join(sorted(map(str, nested)))
        raise BadInput(f"{reader.path}: rope_parameters has {odd:.60}; expected an object for each layer type")
    if kind == "full_attention" and scaling:
        if "type" in scaling and "rope_type" not in scaling:
            raise BadInput(
                f"{reader.path}: rope_scaling has the type {scaling['type']!r:.60}, which transformers 4 follows and 5 "
                "does not\nGive a config.json with rope_type as --model_config."
            )
        own = {"rope_type": "default", **own, **scaling}
    return rope_of(reader, own, reader.get(theta), positions, head_dim)


def rope_of(
    reader: Reader, nested: dict[str, Any], theta: Any, positions: int, head_dim: int, *, partial: bool = False
) -> Rope:
    """The rope of the object `nested`; `theta` and top-level keys are used if it lacks them. Raises BadInput."""
    inner = Reader({"rope_theta": theta, **nested}, reader.path, {ORIGINAL_LENGTH: positions})
    base = inner.number("rope_theta", low=1, high=1e15)
    if ORIGINAL_LENGTH in reader.values:  # `standardize_rope_params` prefers the top-level key
        inner.values = {**inner.values, ORIGINAL_LENGTH: reader.values[ORIGINAL_LENGTH]}
    kind = nested.get("rope_type", nested.get("type", "default"))
    share = _partial(reader, nested, head_dim, partial)
    if kind == "dynamic":  # equals the default up to max_position_embeddings, the longest context
        inner.number("factor", low=1, high=1e6)
        kind = "default"
    if kind not in KINDS:
        raise BadInput(f"{reader.path}: unknown rope type {kind!r:.60}; expected one of {', '.join(KINDS)}")
    return KINDS[kind](inner, base, share, positions, int(head_dim * share) // 2)


def _partial(reader: Reader, nested: dict[str, Any], head_dim: int, allowed: bool) -> float:
    """The rotated fraction of a head. Raises BadInput."""
    given = nested.get(PARTIAL)
    if given is None and allowed:
        given = reader.values.get(PARTIAL, reader.defaults.get(PARTIAL))
    share = 1.0 if given is None else Reader({PARTIAL: given}, reader.path).number(PARTIAL, low=0, high=1)
    if share != 1 and not allowed:
        raise BadInput(f"{reader.path}: {PARTIAL} is {given!r:.60}; expected 1")
    if int(head_dim * share) < 2 or int(head_dim * share) % 2:
        raise BadInput(
            f"{reader.path}: {PARTIAL} is {share:g}; expected an even number of rotated elements of head_dim {head_dim}"
        )
    return share


def _default(inner: Reader, base: float, share: float, positions: int, count: int) -> Rope:
    return Rope(base, partial=share)


def _linear(inner: Reader, base: float, share: float, positions: int, count: int) -> Rope:
    return Rope(base, "linear", inner.number("factor", low=1e-3, high=1e6), partial=share)


def _llama3(inner: Reader, base: float, share: float, positions: int, count: int) -> Rope:
    return Rope(
        base,
        "llama3",
        inner.number("factor", low=1e-3, high=1e6),
        inner.number("low_freq_factor", low=1e-3, high=1e6),
        inner.number("high_freq_factor", low=1e-3, high=1e6),
        inner.integer(ORIGINAL_LENGTH),
        partial=share,
    )


def _yarn(inner: Reader, base: float, share: float, positions: int, count: int) -> Rope:
    original = inner.integer(ORIGINAL_LENGTH)
    factor = inner.number("factor", low=1, high=1e6)
    inner.defaults = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}

    def scale(mscale: float = 1.0) -> float:
        return 0.1 * mscale * logarithm(factor) + 1.0 if factor > 1 else 1.0

    if inner.values.get("attention_factor") is not None:
        attention = inner.number("attention_factor", low=1e-3, high=1e3)
    elif inner.values.get("mscale") and inner.values.get("mscale_all_dim"):
        attention = scale(inner.number("mscale", low=0, high=1e3)) / scale(
            inner.number("mscale_all_dim", low=0, high=1e3)
        )
    else:
        attention = scale()
    if base == 1:
        raise BadInput(f"{inner.path}: rope_theta is 1; yarn needs another value")
    return Rope(
        base,
        "yarn",
        factor,
        original_max_position_embeddings=original,
        partial=share,
        attention_factor=attention,
        beta_fast=inner.number("beta_fast", low=1e-3, high=1e6) if inner.values.get("beta_fast") else 32.0,
        beta_slow=inner.number("beta_slow", low=1e-3, high=1e6) if inner.values.get("beta_slow") else 1.0,
        truncate=inner.flag("truncate"),
    )


def _longrope(inner: Reader, base: float, share: float, positions: int, count: int) -> Rope:
    """Short factors apply to contexts up to the original length, long factors to longer ones."""
    original = inner.integer(ORIGINAL_LENGTH, low=2)
    given = inner.values.get("factor")
    factor = positions / original if given is None else inner.number("factor", low=1e-3, high=1e6)
    if inner.values.get("attention_factor") is not None:
        attention = inner.number("attention_factor", low=1e-3, high=1e3)
    else:
        attention = math.sqrt(1 + logarithm(factor) / logarithm(original)) if factor > 1 else 1.0
    short, long = (_divisors(inner, key, count) for key in ("short_factor", "long_factor"))
    return Rope(
        base,
        "longrope",
        original_max_position_embeddings=original,
        partial=share,
        attention_factor=attention,
        divisors=short,
        long_divisors=long,
    )


def _divisors(inner: Reader, key: str, count: int) -> tuple[float, ...]:
    given = inner.get(key)
    numbers = isinstance(given, list) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and 1e-3 <= value <= 1e6 for value in given
    )
    if not numbers or len(given) != count:
        raise BadInput(f"{inner.path}: {key} is {given!r:.60}; expected {count} numbers, one per frequency")
    return tuple(float(value) for value in given)


KINDS: dict[str, Callable[[Reader, float, float, int, int], Rope]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,
}

"""Consistency checks of a manifest: context, groups, flags and layers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from axrun.format.axmodel import Axmodel
from axrun.format.bundle import Bundle

WEIGHT_TYPES = {
    "fp32": "FLOAT",
    "fp16": "FLOAT16",
    "bf16": "BFLOAT16",
    "s8": "INT8",
    "s4": "INT4",
    "fp8_e4m3": "FLOAT8E4M3FN",
    "fp8_e5m2": "FLOAT8E5M2",
}
MODEL_CONFIG = "model_config"  # the manifest's entry for a config.json given with --model_config

Difference = tuple[str, str, str]  # what, expected, seen


def described(bundle: Bundle) -> Iterator[Difference]:
    """Inconsistencies in the manifest. Flags are checked for axc only: the vendor's compiler has others."""
    context = max((group.history for group in bundle.groups if group.tokens == 1), default=0)
    if context != bundle.kv_cache_len:
        yield "kv_cache_len", f"a context of {bundle.kv_cache_len}", f"a decode group with {context} rows"
    layers = _layers(bundle)
    if layers is not None and layers != bundle.layers:
        yield "layers", f"{layers} layers, as in hf/config.json", f"{bundle.layers}"
    if bundle.maker == "cpu":
        yield from _flags(bundle)


def _flags(bundle: Bundle) -> Iterator[Difference]:
    flags = bundle.manifest.get("flags")
    if not isinstance(flags, dict):
        yield "flags", "an object with the build flags", f"{flags!r:.60}"
        return
    types = tuple(WEIGHT_TYPES)
    prefill = [group for group in bundle.groups if group.tokens > 1]
    for name, wanted in (
        ("weight_type", types),
        ("post_weight_type", types),
        ("hidden_state_type", (bundle.hidden_state_type,)),
        ("kv_cache_len", (bundle.kv_cache_len,)),
        ("prefill_len", (bundle.prefill_len,)),
        ("last_kv_cache_len", ([group.history for group in prefill[1:]],)),
    ):
        seen: Any = flags.get(name)
        if name == "last_kv_cache_len" and not bundle.prefill_len:
            continue  # there is no prefill with history
        if not any(type(seen) is type(each) and seen == each for each in wanted):
            yield f"flag {name}", " or ".join(map(str, wanted)), f"{seen!r:.60}"
    if bundle.prefill_len and {group.tokens for group in prefill} != {bundle.prefill_len}:
        yield "prefill_len", f"groups of {bundle.prefill_len} tokens", f"{[group.tokens for group in prefill]}"
    if not bundle.layer_file.startswith(f"{bundle.model_type}_"):
        yield "model_type", f"the prefix of {bundle.layer_file}", bundle.model_type


def _layers(bundle: Bundle) -> int | None:
    """The number in the checkpoint's config.json; None if it has none or --model_config replaced it."""
    inputs = bundle.manifest.get("inputs")
    if isinstance(inputs, dict) and MODEL_CONFIG in inputs:
        return None
    try:
        values = json.loads((bundle.hf / "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    layers = values.get("num_hidden_layers") if isinstance(values, dict) else None
    return layers if type(layers) is int else None


def weight_types(model: Axmodel) -> Iterator[tuple[str, str]]:
    """The weight types of one of our axmodels, each with its source."""
    yield "in the metadata", model.metadata.get("axmodel.weight_type", "")
    found = {
        tensor.dtype
        for name, tensor in model.initializers.items()
        if len(tensor.dims) == 2 and name.endswith(".weight")
    }
    if len(found) == 1:
        dtype = found.pop()
        yield "of the stored matrices", next((name for name, kind in WEIGHT_TYPES.items() if kind == dtype), dtype)


__all__ = ["described", "weight_types"]

"""The graphs that this compiler would write for a model and a bundle's flags, for comparison with the bundle's."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from axc import build, identity
from axc import compile as compiler
from axc.checkpoints import Checkpoint
from axc.compile import Target
from axc.families.family import ModelConfig
from axc.quantizer.kept import Kept
from axrun.doctor.graphs import CanonicalGraph, canonical, difference
from axrun.format.axmodel import Axmodel

NONE: Mapping[str, Kept] = MappingProxyType({})
Keeping = tuple[tuple[str, Kept], ...]
FLAGS = tuple(sorted(field.name for field in dataclasses.fields(Target)))


def target(manifest: Mapping[str, Any]) -> Target | None:
    """The flags of a bundle's build; None if the manifest does not have them."""
    flags = manifest.get("flags")
    if not isinstance(flags, dict) or set(flags) != set(FLAGS):
        return None
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}
    return Target(**given)


def same_compiler(manifest: Mapping[str, Any]) -> bool:
    """Whether exactly this compiler made the bundle; another version's graphs may differ and be equally good."""
    return bool(manifest["tools"].get("digest") == identity.digest())


@functools.lru_cache(maxsize=64)
def expected(config: ModelConfig, target: Target, index: int | None, kept: Keeping = ()) -> CanonicalGraph:
    """The graph that this compiler writes for a layer, or for the post model (`index` None)."""
    if index is None:
        model, parameters = compiler.post_model(config, target, dict(kept))
    else:
        model, parameters = compiler.layer_model(config, target, index, dict(kept))
    constants = {
        name: zlib.crc32(np.ascontiguousarray(data).tobytes())
        for name, data in parameters.items()
        if isinstance(data, np.ndarray)
    }
    return canonical(model, index, constants)


def graph_difference(
    model: Axmodel, config: ModelConfig, target: Target, index: int | None, kept: Mapping[str, Kept] = NONE
) -> str:
    """The difference of a file's graph from the one that this compiler writes, in words; empty if there is none.

    `kept`: the matrices whose quantisation levels are taken from the checkpoint unchanged.
    """
    wanted = expected(config, target, index, tuple(sorted(kept.items())))
    return difference(canonical(model, index, wanted.constants), wanted, index)


def distinct_graphs(
    checkpoint: Checkpoint, config: ModelConfig, target: Target, calibrated: Mapping[str, Kept] = NONE
) -> dict[str, Any]:
    """All distinct graphs of a model, for `axrun doctor`, which has no compiler. Raises BadInput."""
    stored = checkpoint.tied() if config.tie_word_embeddings else checkpoint
    kept = build.stored_types(stored, config, target.weight_type, target.post_weight_type)[1]
    keeping = tuple(sorted({**kept, **calibrated}.items()))
    distinct: list[dict[str, Any]] = []
    layers = []
    for index in range(config.num_hidden_layers):
        graph = expected(config, target, index, keeping).json()
        if graph not in distinct:
            distinct.append(graph)
        layers.append(distinct.index(graph))
    post = expected(config, target, None, keeping).json()
    return {"digest": identity.digest(), "distinct": distinct, "layers": layers, "post": post}


__all__ = ["FLAGS", "distinct_graphs", "graph_difference", "same_compiler", "target"]

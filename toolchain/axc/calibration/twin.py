"""Models that transformers has no code for: it runs another one that computes the same (`Family.twin`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axc import families
from axc.families.family import ModelConfig
from axc.weights import Source
from axc.weights.sources import Rows, Stacked, Stored


@dataclass(frozen=True)
class Twin:
    """`config` is its config.json. `weights`: the weights of the axmodels, from its tensors. `tensors`: those, from the
    checkpoint's.
    """

    config: Mapping[str, Any]
    weights: Mapping[str, Source]
    tensors: Mapping[str, Source]

    @classmethod
    def find(cls, model: ModelConfig) -> Twin | None:
        """That of a model; None if its family has none."""
        family = families.FAMILIES[model.model_type]
        if family.twin is None:
            return None
        values = family.twin(model)
        other, config = families.read_config(values, Path("config.json"), None)
        theirs = other.weights(config)
        return cls(values, theirs, _tensors(theirs, family.weights(model)))


def _tensors(theirs: Mapping[str, Source], ours: Mapping[str, Source]) -> dict[str, Source]:
    """Each tensor that `theirs` read, from the sources in `ours` of the same weights. Raises TypeError."""
    parts: dict[str, dict[int, Source]] = defaultdict(dict)
    shapes = {name: shape for source in theirs.values() for name, shape in source.reads.items()}
    for weight, source in theirs.items():
        start = source.start if isinstance(source, Rows) else 0
        stored = source.source if isinstance(source, Rows) else source
        if not isinstance(stored, Stored) or source.shape != ours[weight].shape:
            raise TypeError(f"{weight} is no rows of one tensor of its twin")
        parts[stored.name][start] = ours[weight]
    found = {name: _stacked([part for _, part in sorted(own.items())]) for name, own in parts.items()}
    if {name: source.shape for name, source in found.items()} != shapes or theirs.keys() != ours.keys():
        raise TypeError("its twin has other weights")
    return found


def _stacked(parts: list[Source]) -> Source:
    return parts[0] if len(parts) == 1 else Stacked(tuple(parts))

"""Makes the graphs of all axmodels of a bundle from the config, before any weight is read."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from axc import VERSION, families
from axc.families.family import ModelConfig
from axc.graph import Graph, Parameter
from axc.quantizer import WEIGHT_TYPES
from axc.quantizer.kept import Kept
from axc.weights import Source
from axrun.format.axmodel import FORMAT_VERSION, OPSET, PRODUCER, Axmodel, Group
from axrun.format.dtypes import FLOATS

NONE: Mapping[str, Kept] = MappingProxyType({})


@dataclass(frozen=True)
class Target:
    """The compilation target: everything besides the model that determines the axmodels."""

    prefill_len: int
    kv_cache_len: int
    last_kv_cache_len: tuple[int, ...]
    hidden_state_type: str
    weight_type: str
    post_weight_type: str
    post_topk: int
    chip: str
    ret_postnorm: bool = False
    vendor: tuple[str, ...] = ()

    @property
    def groups(self) -> tuple[Group, ...]:
        """0 decode; 1 the first prefill; from 2 on prefill with history."""
        histories = (0, *self.last_kv_cache_len) if self.prefill_len else ()
        prefill = [Group(index, self.prefill_len, history) for index, history in enumerate(histories, 1)]
        return (Group(0, 1, self.kv_cache_len), *prefill)

    @property
    def positions(self) -> int:
        """The number of position ids."""
        return max(group.history + group.tokens for group in self.groups)

    def prefix(self, config: ModelConfig) -> str:
        """The prefix of axmodel file names, as in the vendor's bundles."""
        return config.model_type + (f"_p{self.prefill_len}" if self.prefill_len else "")

    def layer_file(self, config: ModelConfig) -> str:
        """printf template of the layers' file names, as the vendor's."""
        return f"{self.prefix(config)}_l%d{'_together' if self.prefill_len else ''}.axmodel"

    def post_file(self, config: ModelConfig) -> str:
        return f"{config.model_type}_post.axmodel"


@functools.lru_cache(maxsize=2)
def weights(config: ModelConfig) -> Mapping[str, Source]:
    """The source of every weight of a model's axmodels, by name."""
    return families.FAMILIES[config.model_type].weights(config)


def layer_model(
    config: ModelConfig, target: Target, index: int, kept: Mapping[str, Kept] = NONE
) -> tuple[Axmodel, dict[str, Parameter]]:
    """The axmodel of one decoder layer and the sources of its data; matrices in `kept` keep their quantised values."""
    family = families.FAMILIES[config.model_type]
    hidden_type = FLOATS[target.hidden_state_type]
    graph = Graph(f"layer{index}", WEIGHT_TYPES[target.weight_type], hidden_type, weights(config), kept)
    family.layer(config, index, target.positions, graph)
    extra = {"axmodel.layer": str(index)}
    keeps = family.keeps(config, index)
    if keeps.window:
        extra["axmodel.window"] = str(keeps.window)
    if keeps.nothing:
        extra["axmodel.keeps"] = "nothing"
    return _finish(graph, target, "layer", target.groups, target.weight_type, extra)


def post_model(
    config: ModelConfig, target: Target, kept: Mapping[str, Kept] = NONE
) -> tuple[Axmodel, dict[str, Parameter]]:
    """The axmodel of final norm and lm_head, and the sources of its data."""
    hidden_type = FLOATS[target.hidden_state_type]
    graph = Graph("post", WEIGHT_TYPES[target.post_weight_type], hidden_type, weights(config), kept)
    graph.ret_postnorm = target.ret_postnorm
    families.FAMILIES[config.model_type].post(config, target.post_topk, graph)
    return _finish(graph, target, "post", (Group(0, 1, 0),), target.post_weight_type, {})


def _finish(
    graph: Graph, target: Target, kind: str, groups: tuple[Group, ...], weight_type: str, extra: dict[str, str]
) -> tuple[Axmodel, dict[str, Parameter]]:
    listed = [{"tokens": group.tokens, "history": group.history} for group in groups]
    metadata = {
        "axmodel.version": str(FORMAT_VERSION),
        "axmodel.kind": kind,
        "axmodel.groups": json.dumps(listed, separators=(",", ":")),
        "axmodel.chip": target.chip,
        "axmodel.hidden_state_type": target.hidden_state_type,
        "axmodel.weight_type": weight_type,
        **extra,
    }
    return graph.axmodel(VERSION, OPSET, PRODUCER, metadata), graph.parameters

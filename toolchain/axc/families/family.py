"""What an architecture is to the compiler: the numbers that every one has, and the functions that build it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from axc.config_json import Reader
from axc.graph import Graph
from axc.weights import Source


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The numbers that every architecture has, under config.json's names; each adds its own in a subclass."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    sliding_window: int | None = None

    @property
    def kv_size(self) -> int:
        """Width of a row of K or V: what the vendor prints as kv_cache_size."""
        return self.num_key_value_heads * self.head_dim

    @property
    def context(self) -> int:
        """Positions that the model can see at most."""
        return self.max_position_embeddings


@dataclass(frozen=True)
class Keeps:
    """What a layer keeps between tokens: K and V rows of all of them, or it sees those of the last `window` only."""

    window: int | None = None


C = TypeVar("C", bound=ModelConfig)
EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Family(Generic[C]):
    """An architecture. Its file says `FAMILY = Family(...)` and has the name that config.json calls model_type.

    `reads` are the keys of config.json that `config` reads, `defaults` what those mean that are absent, as in
    transformers' class for the model_type. `redundant`: endings of names of tensors that a checkpoint may have and a
    build does not need. `foreign`: --model_type may build another model_type as this one; a test compares all that
    transformers has. `different` are those that look as if they could, and why they cannot.
    """

    config: Callable[[Reader], C]  # from config.json; raises BadInput
    weights: Callable[[C], dict[str, Source]]  # every weight of the axmodels, by its name in them
    layer: Callable[[C, int, int, Graph], None]  # layer `index` into a graph; position ids run below `positions`
    post: Callable[[C, int, Graph], None]  # final norm and head; with the `top_k` likeliest tokens unless that is 0
    reads: frozenset[str]
    defaults: Mapping[str, Any]
    keeps: Callable[[C, int], Keeps] = lambda config, index: Keeps()  # of layer `index`
    axllm_tokenizer: str = ""  # the vendor's name of its byte-level tokenizer; stands for a chat template there too
    redundant: tuple[str, ...] = ("rotary_emb.inv_freq",)
    foreign: bool = False
    different: Mapping[str, str] = field(default_factory=lambda: EMPTY)

"""The interface of an architecture to the compiler: its config, and the functions that build it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from axc.config_json import Reader
from axc.graph import Graph
from axc.weights import Source

EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The values that every architecture has, named as in config.json; a family adds its own in a subclass."""

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
        """Width of a row of K or V; the vendor's compiler calls it kv_cache_size."""
        return self.num_key_value_heads * self.head_dim

    @property
    def context(self) -> int:
        """Maximum number of positions."""
        return self.max_position_embeddings


@dataclass(frozen=True)
class Keeps:
    """The K and V rows that a layer attends to: of all tokens, or of the last `window` ones.

    `nothing`: it has no attention, and no tensors but `input` and `output` (`blocks.plain_input`).
    """

    window: int | None = None
    nothing: bool = False


@dataclass(frozen=True)
class Inside:
    """How a multimodal model_type has a text model. Defaults are those of most."""

    tied: bool = False  # tie_word_embeddings where the key is absent
    flat: bool = False  # its older config.json has the keys of the text model beside vision_config
    mrope: bool = False  # position ids are of three axes, which are equal for text


@dataclass(frozen=True)
class Gguf:
    """An architecture in GGUF files: its `name` there, and the names of a layer's modules here by their names there.

    `permuted`: those whose rows llama.cpp interleaves for its rotation. `biases`: keys of config.json, each with a
    module; the key is true if that has a bias.
    """

    name: str
    layer: Mapping[str, str]
    permuted: tuple[str, ...] = ()
    biases: Mapping[str, str] = field(default_factory=lambda: EMPTY)


C = TypeVar("C", bound=ModelConfig)


@dataclass(frozen=True)
class Family(Generic[C]):
    """An architecture: `FAMILY = Family(...)` in a file named after its model_type.

    `reads`: the keys of config.json that `config` reads. `defaults`: the values of absent keys, as in transformers'
    class for the model_type. `redundant`: suffixes of tensors that a checkpoint may have but a build does not need.
    `foreign`: --model_type may build another model_type as this family; a test compares all those in transformers.
    `inside`: multimodal model_types that have this family as their text model.
    `twin`: config.json of a model of transformers that computes the same, if it has no code for the model_type. Its
    family has the same weights in the axmodels, each a stored tensor or rows of one.
    `gguf`: its names in llama.cpp's files, if those are read.
    `different`: model_types that look buildable as this family, with the reason why they are not.
    """

    config: Callable[[Reader], C]  # from config.json; raises BadInput
    weights: Callable[[C], dict[str, Source]]  # all weights of the axmodels, by their names there
    layer: Callable[[C, int, int, Graph], None]  # (config, index, positions, graph): position ids are below `positions`
    post: Callable[[C, int, Graph], None]  # (config, top_k, graph): final norm and head; `top_k` 0: no top-k outputs
    reads: frozenset[str]
    defaults: Mapping[str, Any]
    keeps: Callable[[C, int], Keeps] = lambda config, index: Keeps()  # of layer `index`
    axllm_tokenizer: str = ""  # the vendor's name of its byte-level tokenizer, which also selects a chat template
    redundant: tuple[str, ...] = ("rotary_emb.inv_freq",)
    foreign: bool = False
    inside: Mapping[str, Inside] = field(default_factory=lambda: EMPTY)
    twin: Callable[[C], dict[str, Any]] | None = None
    gguf: Gguf | None = None
    different: Mapping[str, str] = field(default_factory=lambda: EMPTY)

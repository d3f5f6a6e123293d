"""ModelConfig: every dimension a build needs, read from config.json and held against the tensors' shapes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from axc.checkpoint import EMBEDDING, HEAD, INFINITY, STORED_DTYPES, Checkpoint
from axc.weight_files import refuse_lfs_pointer
from axrun.errors import BadInput


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding. `kind` is default, linear (with `factor`) or llama3 (with all that follows).

    Frequencies as in transformers' modeling_rope_utils.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """The architecture in numbers. Names are config.json's."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    sliding_window: int | None

    @property
    def kv_size(self) -> int:
        """Width of a row of K or V: what the vendor prints as kv_cache_size."""
        return self.num_key_value_heads * self.head_dim


class Reader:
    """config.json as untrusted input: typed, bounded access by key; `defaults` stand in for keys that are absent."""

    def __init__(self, values: dict[str, Any], path: Path, defaults: Mapping[str, Any] = MappingProxyType({})) -> None:
        self.values, self.path, self.defaults = values, path, defaults

    def get(self, key: str) -> Any:
        """Raises BadInput for a key that is absent and has no default."""
        if key not in self.values and key not in self.defaults:
            raise BadInput(f"{self.path}: {key} is missing, and its default is not known")
        return self.values.get(key, self.defaults.get(key))

    def integer(self, key: str, *, low: int = 1, high: int = 1 << 24) -> int:
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise BadInput(f"{self.path}: {key} is {value!r:.60}; expected a whole number from {low} to {high}")
        return value

    def number(self, key: str, *, low: float, high: float) -> float:
        value = self.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            raise BadInput(f"{self.path}: {key} is {value!r:.60}; expected a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str, *, null: bool | None = None) -> bool:
        """True or false, and `null` for null."""
        value = self.get(key)
        value = null if value is None else value
        if not isinstance(value, bool):
            raise BadInput(f"{self.path}: {key} is {value!r:.60}; expected true or false")
        return value

    def expect(self, key: str, *only: str) -> None:
        value = self.get(key)
        if value not in only:
            raise BadInput(f"{self.path}: {key} is {value!r:.60}; this architecture is built with {only[0]!r} only")

    def divisor(self, key: str, of: int) -> int:
        """A divisor of `of`, which is meant where it is null."""
        value = of if self.get(key) is None else self.integer(key)
        if of % value:
            raise BadInput(f"{self.path}: {key} is {value}, which does not divide the {of} attention heads")
        return value

    def head_dim(self, hidden: int, heads: int) -> int:
        """Given, or hidden_size / num_attention_heads; rotary needs it even."""
        given = self.values.get("head_dim") is not None
        if not given and hidden % heads:
            raise BadInput(f"{self.path}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
        value = self.integer("head_dim", low=2) if given else hidden // heads
        if value % 2:
            raise BadInput(f"{self.path}: head_dim is {value}; rotary position embedding needs an even number")
        return value


@dataclass(frozen=True)
class Kin:
    """Another architecture that computes as a family does where its config.json says so.

    `defaults` are those of its own class in transformers. `as_family` gives its config.json as one of the family;
    it raises BadInput where the two compute differently.
    """

    defaults: Mapping[str, Any]
    as_family: Callable[[Reader], dict[str, Any]]


def read_json(path: Path, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint; `pairs` makes its objects. Raises BadInput."""
    try:
        values = json.loads(path.read_text("utf-8"), object_pairs_hook=pairs)
    except FileNotFoundError:
        raise BadInput(f"{path} is missing\nGive the folder of a Hugging Face checkpoint.") from None
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ValueError):
            refuse_lfs_pointer(path)
        raise BadInput(f"cannot read {path}: {str(error)[:200]}") from None
    if not isinstance(values, dict):
        raise BadInput(f"{path} holds a {type(values).__name__}, expected a JSON object")
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys mean one thing each. Raises ValueError."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values and values[key] != value:
            raise ValueError(f"{key:.60} is given twice: {values[key]!r:.40} and {value!r:.40}")
        values[key] = value
    return values


def load(
    checkpoint: Checkpoint,
    model_config: Path | None = None,
    model_type: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> ModelConfig:
    """The config of a checkpoint, cross-checked with the shapes of all its tensors.

    `model_config` replaces the checkpoint's config.json, `model_type` the type named in it. `say` is told what is
    passed over or decided against the letter of the files, as transformers does too.
    Raises BadInput naming the tensors that are missing, unexpected or of another shape.
    """
    from axc import families

    path = model_config or checkpoint.path / "config.json"
    if path.is_file() and path.stat().st_size > MAX_CONFIG:
        raise BadInput(f"{path} has {path.stat().st_size} bytes; expected at most {MAX_CONFIG}")
    values = read_json(path, _once)
    for key in QUANTISED:
        if values.get(key) is not None:
            raise BadInput(
                f"{path} says the checkpoint is quantised already ({key} {values[key]!r:.60})\n"
                "Give the original float checkpoint."
            )
    if checkpoint.aside:
        aside = ", ".join(checkpoint.aside[:4]) + (", ..." if len(checkpoint.aside) > 4 else "")
        say(f"weights: {checkpoint.source}, which transformers prefers; not read: {aside}")
    family, config = families.read_config(values, path, model_type, say)
    names = values.get("architectures")
    if isinstance(names, list) and names and not any("CausalLM" in str(name) for name in names):
        say(f"config.json names {str(names[0])!r:.60}; built as a causal language model, as AutoModelForCausalLM does")
    if values.get("auto_map"):
        say(f"config.json names code of its own (auto_map); it is not run: the model is read as {config.model_type}")
    config = _untied_where_the_head_differs(checkpoint, config, say)
    stored = checkpoint.tied() if config.tie_word_embeddings else checkpoint
    _cross_check(stored, family.tensors(config), family.REDUNDANT, path)
    return config


MAX_CONFIG = 1 << 20  # bytes
# how config.json says so: transformers, older compressed-tensors, MLX
QUANTISED = ("quantization_config", "compression_config", "quantization")


def _untied_where_the_head_differs(
    checkpoint: Checkpoint, config: ModelConfig, say: Callable[[str], None]
) -> ModelConfig:
    """transformers ties what is tied by config.json, except a stored head that differs from the stored embedding."""
    stored = [checkpoint.tensors.get(name) for name in (EMBEDDING, HEAD)]
    if not config.tie_word_embeddings or None in stored:
        return config
    if any(tensor and (tensor.dtype not in INFINITY or len(tensor.shape) != 2) for tensor in stored):
        return replace(config, tie_word_embeddings=False)  # the cross-check names it
    if checkpoint.equal(EMBEDDING, HEAD):
        return config
    say(f"tie_word_embeddings is true, but the stored {HEAD} differs from {EMBEDDING}: used untied, as in transformers")
    return replace(config, tie_word_embeddings=False)


def _cross_check(
    checkpoint: Checkpoint, expected: dict[str, tuple[int, ...]], redundant: tuple[str, ...], path: Path
) -> None:
    stored = checkpoint.tensors
    wrong = [
        f"{name} has shape {list(stored[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    missing = [name for name in expected if name not in stored]
    # a head that is stored and not expected is the embedding again: `load` has compared them
    unexpected = [name for name in stored if name not in expected and name != HEAD and not name.endswith(redundant)]
    odd = [name for name in expected if name in stored and stored[name].dtype not in INFINITY]
    lines = []
    if odd:
        lines.append(
            f"tensor {odd[0]} of {stored[odd[0]].file.name} is stored as {stored[odd[0]].dtype}; "
            f"expected one of {', '.join(STORED_DTYPES)}: give the original float checkpoint"
        )
    if wrong:
        more = f" ({len(wrong) - 1} more of other shapes)" if len(wrong) > 1 else ""
        lines.append(f"{path}: {wrong[0]}{more}")
    if missing:
        lines.append(
            f"{_count(missing)} missing from {checkpoint.path}: {_some(missing)}; does config.json belong to it?"
        )
    if unexpected:
        lines.append(f"{_count(unexpected)} not of this architecture: {_some(unexpected)}; is model_type right?")
    if lines:
        hint = _hint(missing, unexpected)
        raise BadInput("\n".join([*lines[:2], hint] if hint else lines[:3]))


# what the names of tensors that do not belong tell of how they were saved: a pattern, what it is, what to do
ODD_NAMES = (
    (
        r"\.(lora_[AB]|lora_magnitude_vector|base_layer|modules_to_save)\.",
        "They are of an adapter: merge it with merge_and_unload() and save again.",
    ),
    (
        r"\.(qweight|qzeros|scales|g_idx|weight_packed|weight_scale|weight_scale_inv|absmax|quant_map|biases)$",
        "They are quantised weights: give the original float checkpoint.",
    ),
    (r"^tok_embeddings\.|\.attention\.wq\.", "They have Meta's own names: give the version for transformers."),
    (r"\.(LayerNorm)\.(gamma|beta)$|\.(gamma|beta)$", "Names in gamma and beta are of TensorFlow: save again."),
)
# prefixes that wrappers leave in a state_dict
WRAPPERS = {
    "module.": "torch's DataParallel",
    "_orig_mod.": "torch.compile",
    "_forward_module.": "Lightning",
    "base_model.model.": "PEFT",
}


def _hint(missing: list[str], unexpected: list[str]) -> str | None:
    """What the names of misfits tell: a prefix before all of them, or another kind of checkpoint."""
    for pattern, words in ODD_NAMES:
        if any(re.search(pattern, name) for name in unexpected):
            return words
    for name in missing[:1]:
        for odd in unexpected:
            if odd.endswith(f".{name}"):
                prefix = odd.removesuffix(name)
                who = WRAPPERS.get(prefix, "a wrapper around the model")
                return f"Their names begin with {prefix!r:.60}, which {who} adds: save the inner model again."
    return None


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor{'s are' if len(names) > 1 else ' is'}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


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

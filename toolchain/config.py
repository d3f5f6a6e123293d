"""ModelConfig: every dimension a build needs, read from config.json and held against the tensors' shapes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from board.errors import BadInput
from toolchain.checkpoint import INFINITY, STORED_DTYPES, Checkpoint


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
    """config.json as untrusted input: typed, bounded access by key."""

    def __init__(self, values: dict[str, Any], path: Path) -> None:
        self.values, self.path = values, path

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = 1 << 24) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise BadInput(f"{self.path}: {key} is {value!r}; expected a whole number from {low} to {high}")
        return value

    def number(self, key: str, default: float | None = None, *, low: float, high: float) -> float:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            raise BadInput(f"{self.path}: {key} is {value!r:.60}; expected a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise BadInput(f"{self.path}: {key} is {value!r}; expected true or false")
        return value

    def expect(self, key: str, only: str) -> None:
        value = self.values.get(key, only)
        if value != only:
            raise BadInput(f"{self.path}: {key} is {value!r}; this architecture is built with {only!r} only")

    def divisor(self, key: str, of: int) -> int:
        value = self.integer(key, of)
        if of % value:
            raise BadInput(f"{self.path}: {key} is {value}, which does not divide the {of} attention heads")
        return value

    def head_dim(self, hidden: int, heads: int) -> int:
        """Given, or hidden_size / num_attention_heads; rotary needs it even."""
        if self.values.get("head_dim") is None and hidden % heads:
            raise BadInput(f"{self.path}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
        value = self.integer("head_dim", hidden // heads, low=2)
        if value % 2:
            raise BadInput(f"{self.path}: head_dim is {value}; rotary position embedding needs an even number")
        return value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint. Raises BadInput."""
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path} is missing\nGive the folder of a Hugging Face checkpoint.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"cannot read {path}: {error}") from None
    if not isinstance(values, dict):
        raise BadInput(f"{path} holds a {type(values).__name__}, expected a JSON object")
    return values


def load(checkpoint: Checkpoint, model_config: Path | None = None, model_type: str | None = None) -> ModelConfig:
    """The config of a checkpoint, cross-checked with the shapes of all its tensors.

    `model_config` replaces the checkpoint's config.json, `model_type` the type named in it.
    Raises BadInput naming the tensors that are missing, unexpected or of another shape.
    """
    from toolchain import families

    path = model_config or checkpoint.path / "config.json"
    values = read_json(path)
    if values.get("quantization_config") is not None:
        raise BadInput(
            f"{path} says the checkpoint is quantised already ({values['quantization_config']!r:.60})\n"
            "Give the original float checkpoint."
        )
    family = families.find(model_type or values.get("model_type"), path)
    config = family.read_config(Reader(values, path))
    _cross_check(checkpoint, family.tensors(config), family.REDUNDANT, path)
    return config


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
    unexpected = [name for name in stored if name not in expected and not name.endswith(redundant)]
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
        raise BadInput("\n".join(lines[:3]))


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor{'s are' if len(names) > 1 else ' is'}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def read_rope(reader: Reader) -> Rope:
    """Rope from `rope_theta` + `rope_scaling`, or from the newer `rope_parameters`."""
    nested = reader.values.get("rope_parameters") or reader.values.get("rope_scaling") or {}
    if not isinstance(nested, dict):
        raise BadInput(f"{reader.path}: rope_scaling is {nested!r}; expected an object")
    inner = Reader({"rope_theta": reader.values.get("rope_theta"), **nested}, reader.path)
    theta = inner.number("rope_theta", 10000.0, low=1, high=1e15)
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
            inner.integer("original_max_position_embeddings"),
        )
    raise BadInput(f"{reader.path}: rope type {kind!r} is not known; expected default, linear or llama3")

"""Maps a GGUF's architecture: its metadata to a config.json, its tensors to Hugging Face names.

Keys: https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/constants.py . Keys that are not in the table could
change what the model computes, so they are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from axc.checkpoints.gguf.container import ORIGINAL, Container, Strings
from axc.checkpoints.gguf.rows import Rows
from axc.families import FAMILIES
from axc.families.family import Gguf
from axrun.errors import BadInput

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
EMBEDDING = "token_embd.weight"
ROPE_FREQUENCIES = "rope_freqs.weight"  # a divisor for each frequency
LINEAR = "linear"  # llama.cpp's default of rope.scaling.type
# metadata below the architecture's name -> config.json
KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
REQUIRED = (*tuple(KEYS)[:5], "attention.layer_norm_rms_epsilon")
# read elsewhere, or must be absent
KNOWN = {"attention.value_length", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor"}
KNOWN |= {"rope.scaling.original_context_length", "rope.scaling.finetuned", "expert_count", "expert_used_count"}


@dataclass(frozen=True)
class Architecture:
    """A family that is read from GGUF files, and its names there."""

    model_type: str
    names: Gguf

    def tensor_name(self, key: str) -> str:
        """The Hugging Face name of a tensor; unknown names are kept, and refused by the config's cross-check."""
        stem, _, leaf = key.rpartition(".")
        head, _, rest = stem.partition(".")
        if head == "blk":
            index, _, part = rest.partition(".")
            layer = self.names.layer
            return f"model.layers.{index}.{layer[part]}.{leaf}" if part in layer and index.isdecimal() else key
        return f"{TOP[stem]}.{leaf}" if stem in TOP else key


ARCHITECTURES: Mapping[str, Architecture] = {
    family.gguf.name: Architecture(model_type, family.gguf)
    for model_type, family in FAMILIES.items()
    if family.gguf is not None
}


def find(file: Container) -> Architecture:
    """The architecture. Raises BadInput for others, and for a part of a model."""
    # first: only the first part names the architecture
    if (count := file.metadata.get("split.count", 1)) not in (0, 1):
        raise BadInput(
            f"{file.path} is one of {count!r:.20} parts of a model\n"
            "Join them first: llama-gguf-split --merge FIRST-PART WHOLE.gguf"
        )
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise BadInput(
            f"{file.path}: general.architecture is {name!r:.60}; of GGUF files those of {known} are read\n{ORIGINAL}"
        )
    if "adapter.type" in file.metadata or file.metadata.get("general.type", "model") != "model":
        raise BadInput(f"{file.path} is no whole model: its general.type is {file.metadata.get('general.type')!r:.60}")
    return ARCHITECTURES[name]


def row_order(rows: int, heads: int) -> NDArray[np.int64]:
    """The row of the file for each row of a rotated projection in transformers.

    llama.cpp interleaves the two halves of a head (`permute` of its convert_hf_to_gguf.py).
    """
    half = rows // heads // 2
    head, part, at = np.ogrid[:heads, :2, :half]
    return np.asarray(2 * half * head + 2 * at + part).reshape(-1)


def config(file: Container, architecture: Architecture) -> dict[str, Any]:
    """config.json of the model. Raises BadInput for missing or unknown keys."""
    prefix = str(file.metadata["general.architecture"]) + "."
    given = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    unknown = sorted(set(given) - set(KEYS) - KNOWN)
    if unknown:
        raise BadInput(
            f"{file.path}: what {prefix}{unknown[0]:.80} asks for is not known: {given[unknown[0]]!r:.60}\n{ORIGINAL}"
        )
    missing = [key for key in REQUIRED if key not in given]
    if missing:
        raise BadInput(f"{file.path}: its metadata has no {prefix}{missing[0]}\n{ORIGINAL}")
    for key in ("expert_count", "expert_used_count"):
        if given.get(key):
            raise BadInput(
                f"{file.path}: {prefix}{key} is {given[key]!r:.60}: mixtures of experts are not built\n"
                "Give a model without experts."
            )
    for key, value in given.items():
        if isinstance(value, (np.ndarray, Strings)):
            raise BadInput(
                f"{file.path}: {prefix}{key} differs from layer to layer; this is built with one value only\n{ORIGINAL}"
            )
    names = {entry.name for entry in file.tensors}
    values = {KEYS[key]: value for key, value in given.items() if key in KEYS}
    values.setdefault("vocab_size", _vocabulary(file))
    values |= {
        "model_type": architecture.model_type,
        "architectures": [f"{architecture.model_type.capitalize()}ForCausalLM"],
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in names,
    }
    values |= {key: f"blk.0.{part}.bias" in names for key, part in architecture.names.biases.items()}
    for key, name in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")):
        if (number := file.metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            values[name] = number
    _refuse_partial_rotation(file, prefix, values, given)
    values |= _rope(file, prefix, given, values)
    return values


def _vocabulary(file: Container) -> int:
    for entry in file.tensors:
        if entry.name == EMBEDDING:
            return entry.shape[0]
    raise BadInput(f"{file.path}: it has no tensor token_embd.weight")


def _refuse_partial_rotation(file: Container, prefix: str, values: dict[str, Any], given: dict[str, Any]) -> None:
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1:
        raise BadInput(f"{file.path}: {prefix}attention.head_count is {heads!r:.40}; expected a whole number")
    width = values.get("head_dim", hidden // heads)
    for key in ("rope.dimension_count", "attention.value_length"):
        if given.get(key, width) != width:
            raise BadInput(
                f"{file.path}: {prefix}{key} is {given[key]!r:.40}; expected {width}, as wide as a head\n{ORIGINAL}"
            )


def _rope(file: Container, prefix: str, given: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """rope_scaling of config.json: linear from the metadata, llama3 from the tensor of its divisors.

    A factor counts without a type too, and 0 means 1, as in `llama_model::load_hparams` of llama.cpp.
    """
    values.setdefault("rope_theta", 10000.0)
    kind, factor = given.get("rope.scaling.type", LINEAR), given.get("rope.scaling.factor", 1.0)
    if kind not in ("none", LINEAR):
        raise BadInput(f"{file.path}: {prefix}rope.scaling.type is {kind!r:.60}; expected none or linear\n{ORIGINAL}")
    linear = (
        {"rope_scaling": {"rope_type": LINEAR, "factor": factor}} if kind == LINEAR and factor not in (0, 1) else {}
    )
    entry = next((entry for entry in file.tensors if entry.name == ROPE_FREQUENCIES), None)
    if entry is None:
        return linear
    if entry.kind.name != "F32" or len(entry.shape) != 1:
        raise BadInput(f"{file.path}: {ROPE_FREQUENCIES} is {entry.kind.name}{list(entry.shape)}; expected F32 [n]")
    theta = values["rope_theta"]
    if not isinstance(theta, (int, float)) or not 1 <= theta <= 1e15:
        raise BadInput(f"{file.path}: {prefix}rope.freq_base is {theta!r:.40}; expected a number from 1 to 1e15")
    divisors = Rows(file.data, entry, None)(0, entry.shape[0]).reshape(-1)
    if (divisors == 1).all():
        return linear
    if linear:
        raise BadInput(
            f"{file.path}: {prefix}rope.scaling.factor is {factor!r:.40} beside {ROPE_FREQUENCIES}; "
            f"expected one of them\n{ORIGINAL}"
        )
    for original in (8192,):
        scaling = {
            "rope_type": "llama3",
            "factor": float(divisors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }
        if np.allclose(divisors, _llama3(scaling, float(theta), len(divisors)), rtol=1e-5):
            return {"rope_scaling": scaling}
    raise BadInput(f"{file.path}: {ROPE_FREQUENCIES} holds divisors that are not those of Llama 3\n{ORIGINAL}")


def _llama3(scaling: Mapping[str, Any], theta: float, count: int) -> NDArray[np.float64]:
    """Divisors of the frequencies (`_compute_llama3_parameters` of transformers)."""
    wavelengths = 2 * np.pi * theta ** (np.arange(count) / count)
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - smooth) / factor + smooth))

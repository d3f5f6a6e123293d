"""Llama: Llama 2, 3 and 3.2, TinyLlama, SmolLM. Biases only where config.json asks for them.

Some other architectures compute the same where their config.json says so: KIN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from axc.config import Kin, ModelConfig, Reader
from axc.families import decoder
from axc.families.decoder import REDUNDANT, decoder_layer, post, tensors
from axrun.errors import BadInput

__all__ = ["DEFAULTS", "DIFFERENT", "KIN", "READS", "REDUNDANT", "decoder_layer", "post", "read_config", "tensors"]

READS = decoder.READS | {"attention_bias", "mlp_bias"}
# of a key that is absent, as in transformers' LlamaConfig
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": None,
    }
)


# compute differently although their tensors, and every key of their config.json, could be a Llama's
DIFFERENT: Mapping[str, str] = MappingProxyType(
    {
        "ernie4_5": "it rotates neighbouring elements of a head, Llama those half a head apart",
        "helium": "it rotates neighbouring elements of a head, Llama those half a head apart",
        "gemma": "it scales the embedding and adds 1 to the weights of its norms",
    }
)


def read_config(reader: Reader) -> ModelConfig:
    """ModelConfig from a Llama config.json. Raises BadInput."""
    bias, mlp_bias = reader.flag("attention_bias"), reader.flag("mlp_bias")
    window = _window(reader)
    return decoder.read_config(reader, "llama", qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias, sliding_window=window)


def _window(reader: Reader) -> int | None:
    """Llama's own layers see everything, but transformers' cache would slide by a `sliding_window`; Mistral's do."""
    slides, window = decoder.sliding_layers(reader), reader.get("sliding_window")
    if slides and window is None:
        raise BadInput(f"{reader.path}: layer_types has sliding_attention, but there is no sliding_window")
    return None if window is None or slides is False else reader.integer("sliding_window")


def _smollm3(reader: Reader) -> dict[str, Any]:
    """Every layer rotates; a window is in use only where layer_types says so."""
    values, layers = dict(reader.values), reader.integer("num_hidden_layers", high=1024)
    rotates, interval = values.pop("no_rope_layers", None), values.pop("no_rope_layer_interval", 4)
    if rotates is None:
        rotates = [int(bool((index + 1) % interval)) for index in range(layers)] if interval else [1] * layers
    if not isinstance(rotates, list) or len(rotates) != layers or any(one != 1 for one in rotates):
        raise BadInput(
            f"{reader.path}: no_rope_layers is {rotates!r:.60}: layers without rotary embedding are no Llama's"
        )
    if not (values.pop("use_sliding_window", False) and decoder.sliding_layers(reader)):
        values.update(sliding_window=None, layer_types=None)
    return values


def _granite(reader: Reader) -> dict[str, Any]:
    """Its four multipliers must be what Llama has: 1, and 1 / sqrt(head_dim) for attention."""
    values = dict(reader.values)
    head_dim = reader.head_dim(reader.integer("hidden_size"), reader.integer("num_attention_heads"))
    for key in ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier"):
        value = reader.number(key, low=0, high=1e6)
        llamas = 1.0 if key != "attention_multiplier" else 1 / math.sqrt(head_dim)
        if not math.isclose(value, llamas, rel_tol=1e-7):
            raise BadInput(f"{reader.path}: {key} is {value:g}; Llama's is {llamas:g}")
        values.pop(key, None)
    return values


_MISTRAL = {
    **DEFAULTS,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
KIN: Mapping[str, Kin] = MappingProxyType(
    {
        "mistral": Kin(_MISTRAL, lambda reader: dict(reader.values)),
        "ministral": Kin(_MISTRAL, lambda reader: dict(reader.values)),
        "smollm3": Kin(
            {
                **DEFAULTS,
                "vocab_size": 128256,
                "hidden_size": 2048,
                "num_hidden_layers": 36,
                "num_attention_heads": 16,
                "num_key_value_heads": 4,
                "max_position_embeddings": 32768,
                "rope_theta": 2e6,
                "tie_word_embeddings": True,
            },
            _smollm3,
        ),
        "granite": Kin(
            {
                **DEFAULTS,
                "embedding_multiplier": 1.0,
                "residual_multiplier": 1.0,
                "logits_scaling": 1.0,
                "attention_multiplier": 1.0,
            },
            _granite,
        ),
    }
)

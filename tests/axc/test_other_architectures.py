"""Every causal language model of transformers, built as one of our families: equal logits, or refused."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from axc import families
from axc.weights.cross_check import reads
from axrun.errors import BadInput
from tests.axc.as_transformers import AUTO, IDS, SMALL, logits_of, random_model, same

# values that make another architecture equal to one of ours, if it has the key
NEUTRAL: dict[str, Any] = {
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "hidden_activation": "silu",
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_bias", "bias", "qkv_bias", "attention_out_bias"), False),
    **dict.fromkeys(("logits_scaling", "embedding_multiplier", "residual_multiplier", "logit_scale"), 1.0),
    "attention_multiplier": 0.25,
    "partial_rotary_factor": 1.0,
    **dict.fromkeys(("use_qk_norm", "qk_layernorm", "use_sliding_window"), False),
    "no_rope_layers": [1, 1],
    "layer_types": ["full_attention"] * 2,
    "sliding_window": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
SCALED = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
YARN = ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate")
ROPE = {
    "default": (),
    "linear": SCALED[:1],
    "llama3": SCALED,
    "yarn": YARN,
}  # what each kind of rope has besides its theta
EXPLICIT = {"head_dim": 16, "sliding_window": None}
ACCEPTED = {"mistral", "internlm3", "cwm", "seed_oss"}  # among others: the survey finds something


@functools.cache
def variants(kind: str) -> list[Any]:
    """Small configs of an architecture, with its defaults and with simplifying values, if its class allows them."""
    made = []
    for changes in ({}, EXPLICIT, NEUTRAL):
        try:
            plain = transformers.AutoConfig.for_model(kind, **SMALL).to_dict()
            known = {key: copy.deepcopy(value) for key, value in changes.items() if key in plain or key == "head_dim"}
            made.append(transformers.AutoConfig.for_model(kind, **{**SMALL, **known}))
        except Exception:  # whatever a class raises for values it does not allow
            continue
    return made


def as_ours(config: Any, name: str) -> tuple[Any, Any] | None:
    """(its model, the same weights in our family's class) if our compiler accepts it; None if it is refused."""
    values = {"model_type": config.model_type, **json.loads(config.to_json_string(use_diff=True))}
    try:
        family, config_read = families.read_config(values, Path("config.json"), name)
    except BadInput:
        return None
    read: Any = config_read
    with torch.device("meta"):
        try:
            stored = AUTO.from_config(config).state_dict()
        except (TypeError, ValueError, AttributeError, KeyError):
            return None  # transformers cannot make such a model either
    tensors = reads(family.weights(read))
    if stored.keys() - {"lm_head.weight"} != tensors.keys() - {"lm_head.weight"}:
        return None
    if any(tuple(stored[key].shape) != shape for key, shape in tensors.items()):
        return None
    model = random_model(config)
    rope = {"rope_type": read.rope.kind, "rope_theta": read.rope.theta}
    rope |= {key: getattr(read.rope, key) for key in ROPE[read.rope.kind]}
    dimensions = {key: getattr(read, key) for key in SMALL if hasattr(read, key)}
    bias = {key: getattr(read, key) for key in ("attention_bias", "mlp_bias") if hasattr(read, key)}
    same_dimensions = {**dimensions, "head_dim": read.head_dim, "rms_norm_eps": read.rms_norm_eps, **bias}
    twin = AUTO.from_config(
        transformers.AutoConfig.for_model(
            name, **same_dimensions, rope_parameters=rope, tie_word_embeddings=read.tie_word_embeddings
        )
    ).eval()
    twin.load_state_dict(model.state_dict())
    return model, twin


@pytest.mark.parametrize("name", [name for name, family in families.FAMILIES.items() if family.foreign])
def test_accepted_architectures_give_the_logits_of_ours(name: str) -> None:
    accepted, wrong = set(), set()
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        for config in variants(kind):
            if config.model_type == name:
                continue
            pair = as_ours(config, name)
            if pair is None:
                continue
            model, twin = pair
            ids = IDS[: getattr(config, "sliding_window", None) or len(IDS)]
            try:
                logits = logits_of(model, ids)
            except (TypeError, ValueError):
                continue  # transformers cannot run it: a window that its class needs and does not demand
            accepted.add(config.model_type)
            if not same(logits, logits_of(twin, ids)):
                wrong.add(config.model_type)
    assert wrong == set()
    assert name != "llama" or accepted >= ACCEPTED


@pytest.mark.parametrize("kind", families.FAMILIES["llama"].different)
def test_architectures_listed_as_different_compute_other_logits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(families.FAMILIES, "llama", dataclasses.replace(families.FAMILIES["llama"], different={}))
    pairs = [pair for config in variants(kind) if (pair := as_ours(config, "llama")) is not None]
    assert pairs
    assert not any(same(logits_of(model), logits_of(twin)) for model, twin in pairs)

"""config.json is read like AutoConfig reads it, or refused: missing keys, other spellings, contradictions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from axc import families
from axrun.errors import BadInput
from tests.axc.as_transformers import (
    AS_ITSELF,
    DIMENSIONS,
    WHOLE,
    copy_of,
    plan,
    read,
)

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def expected(values: dict[str, Any], kind: str) -> dict[str, Any]:
    """The ModelConfig according to transformers' class for the model_type."""
    config: Any = transformers.AutoConfig.for_model(kind).from_dict(json.loads(json.dumps(values)))
    config.standardize_rope_params()  # again, as a model does that is made from it
    rope = config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    slides = window is not None and (kinds is None or "sliding_attention" in kinds)
    if kind == "smollm3":
        slides = slides and config.use_sliding_window
    return {
        **{key: getattr(config, key) for key in (*DIMENSIONS, "rms_norm_eps")},
        "head_dim": head_dim,
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "sliding_window": window if slides else None,
        "rope": {
            "kind": rope["rope_type"],
            "theta": rope["rope_theta"],
            "factor": rope["factor"] if rope["rope_type"] != "default" else 1.0,
            "original_max_position_embeddings": rope["original_max_position_embeddings"]
            if rope["rope_type"] == "llama3"
            else 0,
        },
    }


def assert_read_alike(values: dict[str, Any], kind: str) -> None:
    config = read(values, kind)
    fields = expected(values, kind)
    rope = fields.pop("rope")
    assert {key: getattr(config, key) for key in fields} == fields
    assert {key: getattr(config.rope, key) for key in rope} == rope


VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "rope_parameters": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7e4}},
    "rope_parameters win over rope_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}},
    "rope_theta fills in rope_parameters": {"rope_parameters": {"rope_type": "default"}},
    "rope_scaling": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "rope_scaling of old": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "rope_type wins over type": {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}},
    "rope_scaling without a type": {"rope_scaling": {"factor": 2.0}},
    "rope_scaling wins over rope_parameters": {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 7e4},
    },
    "an empty rope_scaling does not": {
        "rope_scaling": {},
        "rope_parameters": {"rope_type": "linear", "rope_theta": 7e4, "factor": 4.0},
    },
    "rope_scaling null": {"rope_scaling": None},
    "rope_theta inside rope_scaling": {"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 3e4}},
    "llama3": {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 32}},
    "llama3 without its original length": {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "llama3, the original length beside it wins": {
        "rope_scaling": {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 32},
        "original_max_position_embeddings": 64,
    },
    "llama3, the original length only beside it": {
        "rope_scaling": {"rope_type": "llama3", **LLAMA3},
        "original_max_position_embeddings": 64,
    },
    "num_key_value_heads null": {"num_key_value_heads": None},
    "head_dim": {"head_dim": 32},
    "swish": {"hidden_act": "swish"},
    "whole numbers for floats": {"rope_theta": 10000},
    "untied": {"tie_word_embeddings": False},
    "a window": {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0},
    "a window for no layer": {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2},
    "a window in some layers": {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
    "a window null": {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
    "a window not in use": {"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 0},
    "a window without its flag": {"sliding_window": 32},
    "layer_types full": {"sliding_window": 32, "layer_types": ["full_attention"] * 2},
    "layer_types of old": {"layer_types": ["attention", "attention"]},
    "layer_types with a window": {
        "use_sliding_window": True,
        "sliding_window": 32,
        "layer_types": ["full_attention", "sliding_attention"],
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", AS_ITSELF)
def test_every_spelling(kind: str, variant: str) -> None:
    values = {**WHOLE, **VARIANTS[variant]}
    if kind == "mistral" and values.get("num_key_value_heads", 1) is None:
        del values["num_key_value_heads"]  # its class wants a number: the default, 8
        values["num_attention_heads"] = 8
    if kind == "mistral" and "layer_types" in values:
        kind = "ministral"  # as AutoConfig decides
    whole = set(values.get("layer_types", ())) == {"full_attention"}
    if (
        kind == "granite" and values.get("sliding_window") and not whole
    ):  # its layers do not read it, transformers' cache does
        with pytest.raises(BadInput, match="sliding_window is 32, which changes what the model computes"):
            read(values, kind)
    else:
        assert_read_alike(values, kind)


@pytest.mark.parametrize("nested", [{}, {"original_max_position_embeddings": 32}])
@pytest.mark.parametrize("kind", AS_ITSELF)
def test_llama3_frequencies_with_the_original_length_outside_rope_scaling(kind: str, nested: dict[str, Any]) -> None:
    from axc.rope import frequencies

    values = {
        **WHOLE,
        "model_type": kind,
        "rope_scaling": {"rope_type": "llama3", **LLAMA3, **nested},
        "original_max_position_embeddings": 64,
    }
    said: list[str] = []
    ours: Any = families.read_config(values, Path("config.json"), None, said.append)[1]
    config: Any = transformers.AutoConfig.for_model(kind).from_dict(json.loads(json.dumps(values)))
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    np.testing.assert_allclose(np.array(frequencies(ours.rope, ours.head_dim), float), theirs.numpy(), rtol=1e-6)
    assert not any("original_max_position_embeddings" in line for line in said)


UNFIT = {  # where the class's default does not fit the other values
    ("qwen2", "num_key_value_heads"): "num_key_value_heads is absent, and its default is 32, which does not divide",
    ("mistral", "num_key_value_heads"): "num_key_value_heads is absent, and its default is 8, which does not divide",
}


@pytest.mark.parametrize("key", WHOLE)
@pytest.mark.parametrize("kind", AS_ITSELF)
def test_a_missing_key_has_the_default_of_its_class(kind: str, key: str) -> None:
    """Unless the default is invalid with the other values: 32 key/value heads do not fit 4 heads."""
    values = {**WHOLE}
    del values[key]
    if (kind, key) in UNFIT:
        with pytest.raises(BadInput, match=UNFIT[kind, key]):
            read(values, kind)
    else:
        assert_read_alike(values, kind)


@pytest.mark.parametrize("kind", sorted(families.FAMILIES.keys() & CONFIG_MAPPING.keys()))
def test_defaults_match_transformers(kind: str) -> None:
    """Defaults equal those of the class; keys without one are obsolete, or computed by the class."""
    theirs: Any = transformers.AutoConfig.for_model(kind)
    defaults = families.FAMILIES[kind].defaults
    raw = {field: value.default for field, value in type(theirs).__dataclass_fields__.items()}
    thetas = theirs.default_theta
    raw |= {"rope_theta": thetas} if not isinstance(thetas, dict) else {"rope_theta": thetas["global"]}
    differ = {key: (value, raw[key]) for key, value in defaults.items() if key in raw and raw[key] != value}
    assert differ == {}
    for key in defaults.keys() - raw.keys():
        if key == "partial_rotary_factor":
            assert theirs.rope_parameters[key] == defaults[key]
        else:
            assert key in ABSENT or defaults[key] in (None, False), key


# read from older files: 6 and the local theta as transformers' Gemma3TextConfig has them
ABSENT = {"sliding_window_pattern", "rope_local_base_freq"}


@given(
    values=st.fixed_dictionaries(
        {},
        optional={
            "rope_theta": st.sampled_from([1e4, 1e6, 500000]),
            "rope_scaling": st.one_of(
                st.none(),
                st.fixed_dictionaries(
                    {},
                    optional={
                        "type": st.sampled_from(["default", "linear"]),
                        "rope_type": st.sampled_from(["default", "linear", "llama3"]),
                        "factor": st.sampled_from([1.0, 2.0, 4]),
                        "rope_theta": st.sampled_from([2e4, 3e4]),
                        "low_freq_factor": st.just(1.0),
                        "high_freq_factor": st.just(4.0),
                        "original_max_position_embeddings": st.sampled_from([16, 64]),
                    },
                ),
            ),
            "rope_parameters": st.fixed_dictionaries(
                {"rope_type": st.sampled_from(["default", "linear"])},
                optional={"factor": st.just(8.0), "rope_theta": st.just(9e4)},
            ),
            "use_sliding_window": st.booleans(),
            "sliding_window": st.sampled_from([None, 16, 4096]),
            "max_window_layers": st.integers(0, 3),
            "num_key_value_heads": st.sampled_from([None, 1, 2, 4]),
            "head_dim": st.sampled_from([16, 32]),
            "tie_word_embeddings": st.booleans(),
        },
    ),
    kind=st.sampled_from(["llama", "qwen2"]),
)
def test_random_combinations(values: dict[str, Any], kind: str) -> None:
    values = {**WHOLE, **values}
    try:
        fields = expected(values, kind)
    except (KeyError, ValueError):  # a kind of rope without its numbers
        with pytest.raises(BadInput, match="is missing"):
            read(values, kind)
    else:
        assert fields
        assert_read_alike(values, kind)


# The text itself


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"model_type": "qwen2", "hidden_size": 64, "hidden_size": 128}', "hidden_size is given twice: 64 and 128"),
        ('{"rope_scaling": {"factor": 1, "factor": 2}}', "factor is given twice"),
        ("\ufeff{}", "BOM"),
        (" " * (1 << 20) + "{}", "expected at most 1048576"),
    ],
)
def test_duplicate_keys_and_other_ambiguous_json(models: Any, tmp_path: Path, text: str, said: str) -> None:
    folder = copy_of(models, "qwen2", tmp_path / "hf", {})
    (folder / "config.json").write_text(text)
    with pytest.raises(BadInput, match=said):
        plan(folder, tmp_path / "out")


def test_utf_16(models: Any, tmp_path: Path) -> None:
    folder = copy_of(models, "qwen2", tmp_path / "hf", {})
    (folder / "config.json").write_text((folder / "config.json").read_text(), "utf-16")
    with pytest.raises(BadInput, match=r"config.json: 'utf-8' codec"):
        plan(folder, tmp_path / "out")


ODD: list[Any] = [math.nan, math.inf, -math.inf, True, -1, 0, 10**30, "64", [64], {"x": 1}, 64.5, {"__float__": "NaN"}]


@pytest.mark.parametrize("value", ODD, ids=repr)
@pytest.mark.parametrize("key", sorted({*WHOLE, "head_dim", "sliding_window"} - {"tie_word_embeddings"}))
def test_invalid_values(key: str, value: Any) -> None:
    if key == "rope_theta" and value in (64.5, True):
        value = "1e4"
    if key == "rms_norm_eps" and value == 64.5:
        value = 2
    if key == "hidden_act" and value == "64":
        value = "gelu"
    with pytest.raises(BadInput, match=key):
        read({**WHOLE, key: value}, "llama")


@pytest.mark.parametrize("key", ["tie_word_embeddings", "attention_bias", "mlp_bias"])
@pytest.mark.parametrize("value", [1, 0, "true", None, []], ids=repr)
def test_invalid_flags(key: str, value: Any) -> None:
    with pytest.raises(BadInput, match=key):
        read({**WHOLE, key: value}, "llama")


def test_custom_code_is_not_run_and_reported(models: Any, tmp_path: Path) -> None:
    changes = {"auto_map": {"AutoModelForCausalLM": "modeling_odd.Odd"}, "architectures": ["Odd"]}
    folder = copy_of(models, "llama", tmp_path / "hf", changes)
    said = "\n".join(plan(folder, tmp_path / "out").notices)
    assert "auto_map" in said
    assert "names 'Odd'" in said

"""Which keys of config.json matter: those read by transformers, and those of other architectures."""

from __future__ import annotations

import ast
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from axc import config_keys, families
from axrun.errors import BadInput
from tests.axc.as_transformers import (
    PLAIN,
    SMALL,
    WHOLE,
    change_config,
    copy_of,
    ours,
    plan,
    random_model,
    read,
    same,
    theirs,
)

# Which keys matter


def config_attributes(*modules: Any) -> set[str]:
    """All attributes that the code reads from variables named config."""
    found: set[str] = set()
    for module in modules:
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Attribute) and _is_config(node.value):
                found.add(node.attr)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr") and node.args:
                name = node.args[1]
                if _is_config(node.args[0]) and isinstance(name, ast.Constant):
                    found.add(str(name.value))
    return {name for name in found if not name.startswith("_")}


def _is_config(node: ast.expr) -> bool:
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name in ("config", "decoder_config", "text_config")


@pytest.mark.parametrize("kind", PLAIN)
def test_every_key_that_transformers_reads_is_known(kind: str) -> None:
    from importlib import import_module

    from transformers import cache_utils, masking_utils, modeling_layers, modeling_rope_utils, modeling_utils
    from transformers.integrations import eager_paged, sdpa_attention

    particular = import_module(f"transformers.models.{kind}.modeling_{kind}")
    own = config_attributes(particular)
    assert {"hidden_size", "rms_norm_eps", "rope_parameters"} <= own
    shared = config_attributes(cache_utils, masking_utils, modeling_rope_utils, sdpa_attention, eager_paged)
    assert {"is_causal", "sliding_window"} <= shared
    loader = config_attributes(modeling_utils)
    assert "transformers_weights" in loader
    family = families.FAMILIES[kind]
    known = {*family.reads, *config_keys.SHARED, *config_keys.HARMLESS}
    methods = set(dir(transformers.PreTrainedConfig))
    assert own - known - methods == set()
    # of classification heads, other caches and rotary embeddings that these architectures do not have
    others = {"num_kv_shared_layers", "conv_kernel", "distributed_config", "qk_rope_head_dim", "kv_lora_rank"}
    assert shared - known - methods - others == set()
    assert loader - known - methods - others == set()
    assert config_attributes(modeling_layers) - known - methods - others == {
        "chain_hidden_post_norm",
        "logits_mup_width_multiplier",
        "mtp_hidden_states_first",
        "token_classification_bias",
        "unpadded_vocab_size",
    }


HARMLESS_HERE: dict[str, Any] = {
    "unsloth_version": "2025.1",
    "_name_or_path": "x/y",
    "pretraining_tp": 4,
    "use_cache": False,
    "neuron": {"tp": 8},
    "transformers.js_config": {"dtype": "q4"},
    "attention_dropout": 0.5,
    "torch_dtype": "float32",
    "temperature": 0.1,
    "num_labels": 3,
}
ELSEWHERE: dict[str, Any] = {
    "attention_multiplier": 8.0,
    "embedding_multiplier": 12,
    "logits_scaling": 4.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 256,
    "no_rope_layers": [0, 0],
    "rope_interleaved": True,
    "use_bidirectional_attention": True,
    "layer_norm_eps": 1.0,
    "use_qk_norm": True,
}


@pytest.mark.parametrize("kind", PLAIN)
def test_keys_of_other_architectures_are_ignored_with_a_remark(models: Any, kind: str, tmp_path: Path) -> None:
    folder = copy_of(models, kind, tmp_path / "hf", {**HARMLESS_HERE, **ELSEWHERE})
    assert same(theirs(folder), models[kind][1])
    assert same(ours(folder, tmp_path / "out"), models[kind][1])
    for key, value in ELSEWHERE.items():
        change_config(folder, {key: value}, without=tuple(other for other in ELSEWHERE if other != key))
        said = "\n".join(plan(folder, tmp_path / "out").notices)
        assert f"not read, as in transformers' {kind}: {key} {value!r}" in said
    change_config(folder, {}, without=tuple(ELSEWHERE))
    assert plan(folder, tmp_path / "out").notices == ()
    for rope, odd in (({"rope_type": "linear", "factor": 2.0}, "beta"), ({"rope_type": "dynamic", "factor": 2.0}, "x")):
        change_config(folder, {"rope_scaling": {**rope, "rope_theta": 1e4, odd: 3}})
        (said,) = plan(folder, tmp_path / "out").notices
        assert said == f"config.json: not read, as in transformers' {kind}: rope_scaling.{odd} 3"


@pytest.mark.parametrize(
    ("changes", "loads"),
    [
        ({"is_causal": False}, True),
        ({"is_causal": None}, None),
        ({"per_layer_config": {"0": {"num_key_value_heads": 4}}}, False),
        ({"transformers_weights": "other.safetensors"}, False),
        ({"attention_chunk_size": 8}, None),
        ({"text_config": {"hidden_size": 32}}, None),
        ({"configuration_files": ["config.4.0.0.json"]}, None),
        ({"partial_rotary_factor": 0.5}, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}, None),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, None),
        ({"quantization_config": {"quant_method": "gptq"}}, None),
        ({"quantization": {"group_size": 64, "bits": 4}}, None),
        ({"compression_config": {"quant_method": "sparseml"}}, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, None),
        ({"kv_sharing_modes": ["reuse", "reuse"]}, None),
        ({"layer_types": ["sliding_attention", "full_attention"]}, None),
        ({"layer_types": ["full_attention"]}, None),
        ({"layer_types": ["conv", "conv"]}, None),
    ],
)
@pytest.mark.parametrize("kind", PLAIN)
def test_keys_of_transformers_shared_code_are_refused(
    models: Any, kind: str, tmp_path: Path, changes: dict[str, Any], loads: bool | None
) -> None:
    """`loads`: whether transformers loads it (and computes something else) or fails; None: not tested."""
    folder = copy_of(models, kind, tmp_path / "hf", changes)
    with pytest.raises(BadInput) as refused:
        plan(folder, tmp_path / "out")
    (key,) = changes
    words = "rope" if key.startswith("rope_") and "partial" not in str(changes) else key
    words = "partial_rotary_factor" if "partial" in str(changes) else words
    assert words in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 3
    if loads:
        assert not same(theirs(folder), models[kind][1])
    elif loads is False:
        with pytest.raises((OSError, ValueError, RuntimeError, FileNotFoundError)):
            theirs(folder)


# Misspelt keys


@pytest.mark.parametrize(
    ("kind", "right", "odd"),
    [
        ("llama", "rope_theta", "rope_thetta"),
        ("llama", "rope_scaling", "rope_scalling"),
        ("llama", "rms_norm_eps", "rms_norm_epsilon"),
        ("llama", "num_key_value_heads", "num_kv_heads"),
        ("llama", "tie_word_embeddings", "tie_word_embedding"),
        ("granite", "embedding_multiplier", "embeding_multiplier"),
        ("gemma2", "query_pre_attn_scalar", "query_pre_attention_scalar"),
    ],
)
def test_a_misspelt_key_is_noted(kind: str, right: str, odd: str) -> None:
    said: list[str] = []
    values = {key: value for key, value in {**WHOLE, "model_type": kind}.items() if key != right}
    value = {"rope_type": "linear", "factor": 2.0} if right == "rope_scaling" else 1
    families.read_config({**values, odd: value}, Path("config.json"), None, said.append)
    assert said == [f"config.json: {odd!r} is not known and not read; did you mean {right!r}?"]
    said.clear()
    for silent in ({**values, odd: None}, {**values, right: WHOLE.get(right, value), odd: value}):
        families.read_config(silent, Path("config.json"), None, said.append)
    if right == "rope_theta":
        families.read_config({**values, odd: 1, "rope_parameters": {right: 1e4}}, Path("x"), None, said.append)
    assert said == []


@pytest.mark.parametrize("kind", sorted(families.FAMILIES))
def test_no_key_of_transformers_seems_misspelt(kind: str) -> None:
    reads = families.FAMILIES[kind].reads
    if kind not in transformers.CONFIG_MAPPING:
        return
    whole = transformers.AutoConfig.for_model(kind).to_dict()
    for values in (whole, {key: value for key, value in whole.items() if key not in reads}):
        assert config_keys.misspelt(values, reads) == {}


def test_a_refused_default_is_not_shown_as_a_value_of_the_file() -> None:
    values = {key: value for key, value in WHOLE.items() if key != "num_key_value_heads"}
    with pytest.raises(BadInput) as refused:
        read({**values, "num_key_values_heads": 2}, "qwen3")
    assert "num_key_value_heads is absent, and its default is 32, which does not divide the 4" in str(refused.value)
    assert "It has 'num_key_values_heads': did you mean 'num_key_value_heads'?" in str(refused.value)
    with pytest.raises(BadInput, match="num_key_value_heads is 3, which does not divide the 4"):
        read({**values, "num_key_value_heads": 3}, "qwen3")


# An unknown model_type


def test_an_unknown_key_of_an_unknown_architecture_is_refused(models: Any, tmp_path: Path) -> None:
    folder = copy_of(
        models, "llama", tmp_path / "hf", {"model_type": "newcomer", "twist_factor": 2.0, "use_cache": True}
    )
    with pytest.raises(
        BadInput, match=r"twist_factor 2\.0 of model_type 'newcomer' may change .* llama does not know it"
    ):
        plan(folder, tmp_path / "out", model_type="llama")
    change_config(folder, {"logits_scaling": 1.0, "no_rope_layers": [1, 1]}, without=("twist_factor",))
    assert same(ours(folder, tmp_path / "out", model_type="llama"), models["llama"][1])
    (notice,) = plan(folder, tmp_path / "out", model_type="llama").notices
    assert "'newcomer' is built as llama" in notice


@pytest.mark.parametrize("key", config_keys.ARITHMETIC)
def test_a_key_that_changes_results_is_refused_for_another_type(models: Any, key: str) -> None:
    values = json.loads((models["llama"][0] / "config.json").read_text())
    with pytest.raises(BadInput, match=key):
        read({**values, "model_type": "newcomer", key: ["another"]}, "newcomer", "llama")


@pytest.mark.parametrize("key", ["rms_norm_eps", "hidden_act", "max_position_embeddings", "num_attention_heads"])
def test_defaults_of_an_unknown_architecture_are_refused(key: str) -> None:
    values = {name: value for name, value in WHOLE.items() if name != key}
    with pytest.raises(BadInput, match=f"{key} is missing, and its default is unknown"):
        read(values, "newcomer", "llama")


def test_a_missing_theta_of_an_unknown_architecture_is_refused() -> None:
    values = {name: value for name, value in WHOLE.items() if name != "rope_theta"}
    with pytest.raises(BadInput, match="rope_theta is missing"):
        read(values, "newcomer", "llama")
    assert read({**values, "rope_parameters": {"rope_theta": 7.0}}, "newcomer", "llama").rope.theta == 7.0


def test_a_missing_key_has_the_default_of_the_checkpoint_s_own_class() -> None:
    """cwm's class has a window in three of four layers and another rope; config.json has neither."""
    config = read(WHOLE, "cwm", "llama")
    theirs: Any = transformers.AutoConfig.for_model("cwm").from_dict({**WHOLE})
    assert config.sliding_window == theirs.sliding_window == 8192
    assert "sliding_attention" in theirs.layer_types
    assert config.head_dim == theirs.head_dim
    assert (config.rope.kind, config.rope.theta) == ("llama3", theirs.rope_parameters["rope_theta"])
    with pytest.raises(BadInput, match=r"partial_rotary_factor is 0\.5"):
        read(WHOLE, "glm", "llama")
    with pytest.raises(BadInput, match="sliding_window_pattern 4 of model_type 'exaone4'"):
        read(WHOLE, "exaone4", "llama")


@pytest.mark.parametrize("kind", ["cwm", "newcomer"])
def test_without_transformers_another_type_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BadInput, match=f"the defaults of absent keys of model_type '{kind}' are in transformers"):
        read(WHOLE, kind, "llama")
    assert read(WHOLE, "mistral").sliding_window == 4096  # a family: its defaults are known here


@pytest.mark.parametrize("kind", ["ministral3", "newcomer"])
@pytest.mark.parametrize("where", ["rope_parameters", "rope_scaling"])
def test_an_unknown_rope_key_of_another_type_is_refused(kind: str, where: str) -> None:
    nested = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.5}
    with pytest.raises(BadInput, match=r"llama_4_scaling_beta 0\.5.* in rope_\w+ of model_type"):
        read({**WHOLE, "sliding_window": None, where: nested}, kind, "llama")


# Differences found by comparing with transformers key by key


def test_gemma3_ignores_softcapping_in_its_config(tmp_path: Path) -> None:
    kind: Any = {"head_dim": 16, "layer_types": ["full_attention"] * 2, "attn_logit_softcapping": 1.5}
    config = transformers.AutoConfig.for_model("gemma3_text", **{**SMALL, **kind})
    random_model(config).save_pretrained(tmp_path / "hf")
    assert same(ours(tmp_path / "hf", tmp_path / "out"), theirs(tmp_path / "hf"))
    assert "attn_logit_softcapping 1.5" in "\n".join(plan(tmp_path / "hf", tmp_path / "out").notices)


@pytest.mark.parametrize("kind", ["smollm3", "qwen2", "qwen3"])
def test_a_disabled_sliding_window_is_refused(kind: str) -> None:
    """transformers applies the window in its masks even if use_sliding_window is false."""
    windows = {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 24,
        "use_sliding_window": False,
    }
    with pytest.raises(BadInput, match="no sliding_window is in use"):
        read({**WHOLE, **windows}, kind)


def test_gelu_of_gemma_is_its_tanh_approximation(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model("gemma", **{**SMALL, "head_dim": 32})
    random_model(config).save_pretrained(tmp_path / "hf")
    change_config(tmp_path / "hf", {"hidden_act": "gelu"})
    assert same(ours(tmp_path / "hf", tmp_path / "out"), theirs(tmp_path / "hf"))


def test_keys_that_transformers_4_and_5_read_differently_are_refused() -> None:
    with pytest.raises(BadInput, match="type 'linear', which transformers 4 follows and 5 does not"):
        read({**WHOLE, "rope_scaling": {"type": "linear", "factor": 8.0}}, "gemma3_text")
    scaled = read({**WHOLE, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "gemma3_text")
    assert (scaled.rope.kind, scaled.local_rope.kind) == ("linear", "default")


@pytest.mark.parametrize("kind", ["llama", "granite", "olmo3", "gemma3_text"])
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("value", [0, False, [], "", 1])
def test_values_other_than_objects_are_refused(kind: str, key: str, value: Any) -> None:
    with pytest.raises(BadInput, match=f"{key} is .*; expected an object"):
        read({**WHOLE, key: value}, kind)


@pytest.mark.parametrize("kind", ["llama", "granite", "olmo2"])
def test_the_number_of_layer_types_is_checked(kind: str) -> None:
    with pytest.raises(BadInput, match="layer_types has 3 entries; expected num_hidden_layers 2"):
        read({**WHOLE, "layer_types": ["full_attention"] * 3}, kind)


def test_a_missing_head_dim_has_the_default_of_its_class() -> None:
    assert read(WHOLE, "qwen3").head_dim == 128
    assert read(WHOLE, "llama").head_dim == 16

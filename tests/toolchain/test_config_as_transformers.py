"""config.json: what AutoConfig makes of it, or a refusal, for keys dropped, respelt, contradicting and unknown."""

from __future__ import annotations

import ast
import inspect
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from board.errors import BadInput
from tests.toolchain.as_transformers import AUTO, IDS, SMALL, change_config, ours, plan, random_model, same, theirs
from toolchain import config_keys, families
from toolchain.config import ModelConfig

DIMENSIONS = {key: value for key, value in SMALL.items() if not key.endswith("_id") and key != "initializer_range"}
WHOLE = {**DIMENSIONS, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 5e5, "tie_word_embeddings": True}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
AS_ITSELF = ["llama", "qwen2"]
KIN = ["mistral", "smollm3", "granite"]
GRANITE = {"attention_multiplier": 0.25}
NEUTRAL: dict[str, dict[str, Any]] = {"mistral": {}, "smollm3": {}, "granite": GRANITE, "ministral": {}}


def read(values: dict[str, Any], kind: str, family: str | None = None) -> ModelConfig:
    return families.read_config({"model_type": kind, **values}, Path("config.json"), family)[1]


def expected(values: dict[str, Any], kind: str) -> dict[str, Any]:
    """What transformers' class for the model_type makes of it, in the terms of ModelConfig."""
    config: Any = transformers.AutoConfig.for_model(kind).from_dict(json.loads(json.dumps(values)))
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


def assert_read_alike(values: dict[str, Any], kind: str, family: str | None = None) -> None:
    config = read(values, kind, family)
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
    "llama3, the original length beside it is not read": {
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
    assert_read_alike({**WHOLE, **VARIANTS[variant]}, kind)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KIN)
def test_every_spelling_of_kin(kind: str, variant: str) -> None:
    values = {**WHOLE, **NEUTRAL[kind], **VARIANTS[variant]}
    if kind == "granite" and "head_dim" in values:
        values["attention_multiplier"] = values["head_dim"] ** -0.5
    if kind == "mistral" and values["num_key_value_heads"] is None:
        del values["num_key_value_heads"]  # its class wants a number: the default, 8
        values["num_attention_heads"] = 8
    if kind == "mistral" and "layer_types" in values:
        kind = "ministral"  # as AutoConfig decides
    assert_read_alike(values, kind, "llama")


UNFIT = {  # where the class's default does not fit the other values
    ("qwen2", "num_key_value_heads"): "num_key_value_heads is 32, which does not divide",
    ("mistral", "num_key_value_heads"): "num_key_value_heads is 8, which does not divide",
    ("granite", "hidden_size"): "attention_multiplier",
    ("granite", "num_attention_heads"): "attention_multiplier",
    ("smollm3", "num_hidden_layers"): "no_rope_layers",
}


@pytest.mark.parametrize("key", WHOLE)
@pytest.mark.parametrize("kind", [*AS_ITSELF, *KIN])
def test_a_key_that_is_absent_has_its_class_s_default(kind: str, key: str) -> None:
    """Or the value that remains is refused: 32 key/value heads do not fit 4 heads."""
    values = {**WHOLE, **NEUTRAL.get(kind, {})}
    del values[key]
    family = "llama" if kind in KIN else None
    if (kind, key) in UNFIT:
        with pytest.raises(BadInput, match=UNFIT[kind, key]):
            read(values, kind, family)
    else:
        assert_read_alike(values, kind, family)


def test_defaults_are_those_of_transformers() -> None:
    for name, family in families.FAMILIES.items():
        sources = {name: family.DEFAULTS, **{kin: entry.defaults for kin, entry in family.KIN.items()}}
        for kind, defaults in sources.items():
            theirs: Any = transformers.AutoConfig.for_model(kind)
            raw = {field: value.default for field, value in type(theirs).__dataclass_fields__.items()}
            raw["rope_theta"] = theirs.default_theta
            differ = {key: (value, raw[key]) for key, value in defaults.items() if key in raw and raw[key] != value}
            assert differ == {}, kind
            absent = [key for key in defaults if key not in raw]
            assert set(absent) <= {"attention_bias", "mlp_bias", "sliding_window"}, (kind, absent)


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
    kind=st.sampled_from(AS_ITSELF),
)
def test_any_of_them_together(values: dict[str, Any], kind: str) -> None:
    values = {**WHOLE, **values}
    try:
        fields = expected(values, kind)
    except (KeyError, ValueError):  # a kind of rope without its numbers
        with pytest.raises(BadInput, match="is missing"):
            read(values, kind)
    else:
        assert fields
        assert_read_alike(values, kind)


# Which keys matter


def config_attributes(*modules: Any) -> set[str]:
    """Every attribute that code reads of a thing called config."""
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


@pytest.mark.parametrize("kind", AS_ITSELF)
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
    known = family.READS | config_keys.SHARED.keys() | config_keys.HARMLESS
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


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """A tiny checkpoint of each family and each of its kin, at values that make it a Llama."""
    made = {}
    for kind in (*AS_ITSELF, *KIN):
        neutral = {**NEUTRAL.get(kind, {}), **({"sliding_window": None} if kind == "mistral" else {})}
        config = transformers.AutoConfig.for_model(kind, **SMALL, **neutral, tie_word_embeddings=True)
        folder = tmp_path_factory.mktemp(kind) / kind
        random_model(config).save_pretrained(folder)
        made[kind] = (folder, theirs(folder))
    return made


def copy_of(models: dict[str, tuple[Path, Any]], kind: str, to: Path, changes: dict[str, Any]) -> Path:
    to.mkdir()
    for path in models[kind][0].iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    change_config(to, changes)
    return to


@pytest.mark.parametrize("kind", AS_ITSELF)
def test_keys_of_other_architectures_change_nothing_and_are_said(models: Any, kind: str, tmp_path: Path) -> None:
    folder = copy_of(models, kind, tmp_path / "hf", {**HARMLESS_HERE, **ELSEWHERE})
    assert same(theirs(folder), models[kind][1])
    assert same(ours(folder, tmp_path / "out"), models[kind][1])
    for key, value in ELSEWHERE.items():
        change_config(folder, {key: value}, without=tuple(other for other in ELSEWHERE if other != key))
        said = "\n".join(plan(folder, tmp_path / "out").notices)
        assert f"not read, as in transformers' {kind}: {key} {value!r}" in said
    change_config(folder, {}, without=tuple(ELSEWHERE))
    assert plan(folder, tmp_path / "out").notices == ()


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
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, None),
        ({"kv_sharing_modes": ["reuse", "reuse"]}, None),
        ({"layer_types": ["sliding_attention", "full_attention"]}, None),
        ({"layer_types": ["full_attention"]}, None),
        ({"layer_types": ["conv", "conv"]}, None),
    ],
)
@pytest.mark.parametrize("kind", AS_ITSELF)
def test_what_transformers_code_for_all_reads_is_refused(
    models: Any, kind: str, tmp_path: Path, changes: dict[str, Any], loads: bool | None
) -> None:
    """`loads`: transformers loads it and computes something else, or fails; None is not of interest."""
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


# Windows


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1, "layer_types": None}),
        ("llama", {"sliding_window": 24}),
        ("mistral", {"sliding_window": 24}),
        ("mistral", {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}),
    ],
)
def test_a_context_ends_with_the_window(models: Any, kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    folder = copy_of(models, kind, tmp_path / "hf", changes)
    options: dict[str, Any] = {} if kind in AS_ITSELF else {"model_type": "llama"}
    with pytest.raises(BadInput, match=r"expected 1 to 23: the model sees 24 positions, its sliding_window"):
        plan(folder, tmp_path / "out", kv_cache_len=24, **options)
    got = ours(folder, tmp_path / "out", IDS[:23], kv_cache_len=23, prefill_len=8, **options)
    assert same(got, theirs(folder, IDS[:23]))
    if kind != "llama":  # whose prefill sees everything and whose cache does not
        assert not same(theirs(folder), models[kind][1])


def test_transformers_cache_slides_for_a_llama_with_a_window(models: Any, tmp_path: Path) -> None:
    """Why a Llama's sliding_window, which its layers do not read, bounds the context."""
    folder = copy_of(models, "llama", tmp_path / "hf", {"sliding_window": 24})
    model = AUTO.from_pretrained(folder, dtype=torch.float32).eval()
    cache, rows = None, []
    with torch.inference_mode():
        for token in IDS:
            step = model(torch.tensor([[int(token)]]), past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            rows.append(step.logits[0, -1].numpy())
    plain = models["llama"][1]
    assert same(np.array(rows)[:24], plain[:24])
    assert not same(np.array(rows), plain)


# Kin


@pytest.mark.parametrize("kind", KIN)
def test_kin_that_compute_as_llama_does(models: Any, kind: str, tmp_path: Path) -> None:
    folder, logits = models[kind]
    with pytest.raises(BadInput, match="This one computes as llama does: pass --model_type llama"):
        plan(folder, tmp_path / "out")
    assert same(ours(folder, tmp_path / "out", model_type="llama"), logits)
    assert plan(folder, tmp_path / "out", model_type="llama").notices == ()


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers is [1, 0]"),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 2}, "no_rope_layers is [1, 0]"),
        ("granite", {"attention_multiplier": 1.0}, "attention_multiplier is 1; Llama's is 0.25"),
        ("granite", {"embedding_multiplier": 12.0}, "embedding_multiplier is 12"),
        ("granite", {"residual_multiplier": 0.22}, "residual_multiplier is 0.22"),
        ("granite", {"logits_scaling": 8.0}, "logits_scaling is 8"),
    ],
)
def test_kin_that_compute_otherwise(models: Any, kind: str, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = copy_of(models, kind, tmp_path / "hf", changes)
    assert not same(theirs(folder), models[kind][1])
    for options in ({}, {"model_type": "llama"}):
        with pytest.raises(BadInput) as refused:
            plan(folder, tmp_path / "out", **options)
        assert said in str(refused.value)
        assert "pass --model_type" not in str(refused.value)


def test_granite_multipliers_that_are_absent_are_granite_s(models: Any, tmp_path: Path) -> None:
    folder = copy_of(models, "granite", tmp_path / "hf", {})
    change_config(folder, {}, without=("attention_multiplier",))
    assert not same(theirs(folder), models["granite"][1])
    with pytest.raises(BadInput, match="attention_multiplier is 1"):
        plan(folder, tmp_path / "out", model_type="llama")


def test_the_hint_names_the_window(models: Any, tmp_path: Path) -> None:
    folder = copy_of(models, "mistral", tmp_path / "hf", {"sliding_window": 24})
    with pytest.raises(BadInput, match=r"pass --model_type llama and a --kv_cache_len below its sliding_window 24"):
        plan(folder, tmp_path / "out")
    change_config(folder, {}, without=("sliding_window",))
    with pytest.raises(BadInput, match=r"below its sliding_window 4096"):
        plan(folder, tmp_path / "out")


# Another model_type, of which nothing is known


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
def test_a_key_of_arithmetic_is_refused_under_another_type(models: Any, key: str) -> None:
    values = json.loads((models["llama"][0] / "config.json").read_text())
    with pytest.raises(BadInput, match=key):
        read({**values, "model_type": "newcomer", key: ["another"]}, "newcomer", "llama")


@pytest.mark.parametrize("key", ["rms_norm_eps", "hidden_act", "max_position_embeddings", "num_attention_heads"])
def test_a_default_of_an_unknown_architecture_is_not_known(key: str) -> None:
    values = {name: value for name, value in WHOLE.items() if name != key}
    with pytest.raises(BadInput, match=f"{key} is missing, and its default is not known"):
        read(values, "newcomer", "llama")


def test_the_theta_of_an_unknown_architecture_is_not_known() -> None:
    values = {name: value for name, value in WHOLE.items() if name != "rope_theta"}
    with pytest.raises(BadInput, match="rope_theta is missing"):
        read(values, "newcomer", "llama")
    assert read({**values, "rope_parameters": {"rope_theta": 7.0}}, "newcomer", "llama").rope.theta == 7.0


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
def test_text_that_says_two_things(models: Any, tmp_path: Path, text: str, said: str) -> None:
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
def test_values_that_are_none(key: str, value: Any) -> None:
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
def test_flags_that_are_none(key: str, value: Any) -> None:
    with pytest.raises(BadInput, match=key):
        read({**WHOLE, key: value}, "llama")


def test_code_of_its_own_is_not_run_and_that_is_said(models: Any, tmp_path: Path) -> None:
    changes = {"auto_map": {"AutoModelForCausalLM": "modeling_odd.Odd"}, "architectures": ["Odd"]}
    folder = copy_of(models, "llama", tmp_path / "hf", changes)
    said = "\n".join(plan(folder, tmp_path / "out").notices)
    assert "auto_map" in said
    assert "names 'Odd'" in said

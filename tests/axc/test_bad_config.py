"""Invalid config.json and other JSON files of a checkpoint: one clear error, and nothing is written."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest

from tests.axc.axc import assert_build_refused, assert_done, llm_build
from tests.axc.conftest import Breakable

DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        pytest.param(
            {"model_type": "qwen2_9"},
            [
                "'qwen2_9' is not supported; the nearest family by name is qwen2",
                "README.md lists the supported models; to add this one, follow docs/adding-a-family.md",
                "and write toolchain/axc/families/qwen2_9.py",
            ],
            id="unknown architecture",
        ),
        pytest.param(
            {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8},
            ["the nearest family by name is qwen3,", "which does not read num_experts 128, num_experts_per_tok 8"],
            id="a mixture of experts",
        ),
        pytest.param(
            {"model_type": "apertus"},
            ["'apertus' is not supported; the nearest family by the keys it reads is qwen2"],
            id="a name that is hardly similar",
        ),
        pytest.param(
            {"model_type": "mamba-2"}, ["'mamba-2'", "toolchain/axc/families/mamba_2.py"], id="nothing is near"
        ),
        pytest.param(
            {"model_type": "Qwen2"}, ["'Qwen2' is not supported; did you mean 'qwen2'"], id="a capital letter"
        ),
        pytest.param({"model_type": "family"}, ["write toolchain/axc/families/NAME.py"], id="a file that is there"),
        pytest.param({"model_type": "blocks"}, ["write toolchain/axc/families/NAME.py"], id="a package that is there"),
        pytest.param(
            {"model_type": None},
            ["None is not supported", "the nearest family by the keys it reads is"],
            id="no architecture",
        ),
        pytest.param({"model_type": ["qwen2"]}, ["['qwen2'] is not supported"], id="architecture of another type"),
        pytest.param(
            {"hidden_size": 256},
            ["has shape [{vocab_size}, 128], expected [{vocab_size}, 256]", "more"],
            id="hidden_size",
        ),
        pytest.param(
            {"intermediate_size": 100},
            ["model.layers.0.mlp.gate_proj.weight has shape [384, 128], expected [100, 128]"],
            id="intermediate_size",
        ),
        pytest.param(
            {"vocab_size": 99},
            ["model.embed_tokens.weight", "[{vocab_size}, 128], expected [99, 128]"],
            id="vocab_size",
        ),
        pytest.param({"num_key_value_heads": 1}, ["k_proj.weight", "expected [32, 128]"], id="key/value heads"),
        pytest.param({"num_key_value_heads": 3}, ["num_key_value_heads is 3", "does not divide"], id="no divisor"),
        pytest.param({"head_dim": 33}, ["head_dim is 33", "even"], id="odd head_dim"),
        pytest.param({"num_hidden_layers": 5}, ["tensors are missing", "model.layers.4."], id="a layer too many"),
        pytest.param(
            {"num_hidden_layers": 3},
            ["12 tensors are not", "model.layers.3."],
            id="a layer too few",
        ),
        pytest.param({"tie_word_embeddings": False}, ["1 tensor is missing", "lm_head.weight"], id="untied"),
        pytest.param({"hidden_size": "128"}, ["hidden_size is '128'", "whole number"], id="a string"),
        pytest.param({"hidden_size": True}, ["hidden_size is True", "whole number"], id="a flag"),
        pytest.param({"hidden_size": 10**30}, ["hidden_size is 1000", "whole number"], id="huge"),
        pytest.param({"num_hidden_layers": 0}, ["num_hidden_layers is 0"], id="no layers"),
        pytest.param({"rms_norm_eps": 0}, ["rms_norm_eps is 0", "a number from"], id="epsilon 0"),
        pytest.param({"rms_norm_eps": 10**400}, ["rms_norm_eps is", "number"], id="epsilon above every float"),
        pytest.param({"rms_norm_eps": 1e300}, ["rms_norm_eps is 1e+300"], id="epsilon above every float32"),
        pytest.param({"hidden_act": "gelu"}, ["hidden_act is 'gelu'", "'silu'"], id="another activation"),
        pytest.param({"rope_scaling": {"rope_type": "twist"}}, ["'twist'", "llama3"], id="another rope"),
        pytest.param({"rope_scaling": {"rope_type": "yarn"}}, ["factor is missing"], id="yarn without its factor"),
        pytest.param({"rope_scaling": [1]}, ["rope_scaling is [1]", "object"], id="rope of another type"),
        pytest.param({"rope_scaling": {"rope_type": "linear"}}, ["factor is missing"], id="rope without its factor"),
        pytest.param(
            {"rope_scaling": {"rope_type": "linear", "factor": 1e-300}}, ["factor"], id="rope that is not finite"
        ),
        pytest.param(
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            ["quantised already", "'bitsandbytes'", "read are auto-round, awq", "original float checkpoint"],
            id="quantised by an unknown method",
        ),
        pytest.param(
            {"quantization": {"group_size": 64, "bits": 4}},
            ["quantised already (quantization: {{'group_size': 64", "original float checkpoint"],
            id="quantised by MLX",
        ),
        pytest.param(
            {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
            ["says that weights are quantised", "gptq", "none is stored so", "original float checkpoint"],
            id="said to be quantised",
        ),
    ],
)
def test_wrong_config(
    checkpoint: Breakable, pristine: Path, tmp_path: Path, changes: dict[str, Any], said: list[str]
) -> None:
    """`said` may name the shipped config's keys in braces."""
    right = json.loads((pristine / "config.json").read_text())
    assert_build_refused(checkpoint(**changes), tmp_path, *(word.format(**right) for word in said))


@pytest.mark.parametrize("text", ["", "{", "[]", '"qwen2"', "\x00\x01", DEEP, '{"hidden_size": 1' + "0" * 5000 + "}"])
def test_config_that_is_not_a_json_object(checkpoint: Breakable, tmp_path: Path, text: str) -> None:
    folder = checkpoint()
    (folder / "config.json").write_text(text)
    assert_build_refused(folder, tmp_path, "config.json")


def test_a_million_layers_are_refused_before_their_names_fill_the_memory(checkpoint: Breakable, tmp_path: Path) -> None:
    assert_build_refused(
        checkpoint(num_hidden_layers=1 << 24), tmp_path, "layers", limits={resource.RLIMIT_DATA: 1 << 30}
    )


def test_the_longest_context_needs_little_memory(checkpoint: Breakable, tmp_path: Path) -> None:
    folder, bundle = checkpoint(max_position_embeddings=1 << 24), tmp_path / "bundle"
    flags = ("--kv_cache_len", (1 << 20) - 1)
    assert_done(llm_build(folder, bundle, *flags, limits={resource.RLIMIT_DATA: 1 << 30}))
    assert sum(file.stat().st_size for file in bundle.glob("*.axmodel")) < 4 << 20  # tables of all positions: 0.5 GB


# Files that are copied

TOKENIZERS = {
    "truncated": '{"model": {"type": "BPE", "vocab"',
    "deep": DEEP,
    "a list": "[]",
    "model a list": {"model": ["BPE"]},
    "no vocab": {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "ByteLevel"}},
    "no merges": {"model": {"type": "BPE", "vocab": {"a": 0}}, "pre_tokenizer": {"type": "ByteLevel"}},
    "merges of numbers": {
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [5]},
        "pre_tokenizer": {"type": "ByteLevel"},
    },
    "half a character": {
        "model": {"type": "BPE", "vocab": {"\ud800": 0}, "merges": []},
        "pre_tokenizer": {"type": "ByteLevel"},
    },
    "a token without id": {
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
        "pre_tokenizer": {"type": "ByteLevel"},
        "added_tokens": [{"content": "x"}],
    },
}


@pytest.mark.parametrize("content", TOKENIZERS.values(), ids=TOKENIZERS)
def test_damaged_tokenizer(checkpoint: Breakable, tmp_path: Path, content: object) -> None:
    folder = checkpoint()
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "tokenizer.json").write_text(text)
    assert_build_refused(folder, tmp_path, "tokenizer.json")


@pytest.mark.parametrize("text", ["{", "[]", DEEP, '{"top_k": Infinity}', '{"temperature": NaN}'])
def test_damaged_generation_config(checkpoint: Breakable, tmp_path: Path, text: str) -> None:
    folder = checkpoint()
    (folder / "generation_config.json").write_text(text)
    assert_build_refused(folder, tmp_path, "generation_config.json")

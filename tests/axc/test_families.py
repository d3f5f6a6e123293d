"""Whole models of every family, compiled and run, against transformers on the same random checkpoints.

A row a family or a particular of one. 100 tokens go through three prefill groups and decode, past every window here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from axc import build, check, families
from axrun.batch import Batch
from axrun.format.bundle import Bundle
from axrun.job import Computed, Job
from axrun.model import Model
from axrun.sequence import Sequence
from tests.axc import test_multimodal as multimodal

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [2.0] * 6,
    "partial_rotary_factor": 0.75,
}
MIXED = ["sliding_attention", "full_attention"]
MULTIPLIERS = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.1,
    "logits_scaling": 4.0,
}
# model_type, what is particular: of transformers' class
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, untied, every head its own K/V": ("qwen2", {"num_key_value_heads": 4}),
    "qwen2, windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    "llama 2": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama 3.2": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama, linear rope": ("llama", {"rope_parameters": LINEAR}),
    "llama, dynamic rope": ("llama", {"rope_parameters": {**LINEAR, "rope_type": "dynamic"}}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "llama, yarn, all keys": (
        "llama",
        {"rope_parameters": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.8, "beta_fast": 8.0, "truncate": False}},
    ),
    "llama, biases everywhere": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, odd head_dim": ("llama", {"head_dim": 48}),
    "smollm, three query heads to one": (
        "llama",
        {"hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3},
    ),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3, biases and windows": (
        "qwen3",
        {
            "head_dim": 24,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 20,
            "layer_types": MIXED,
        },
    ),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "mistral, window": ("mistral", {"sliding_window": 24}),
    "ministral": ("ministral", {"sliding_window": 17, "head_dim": 24, "layer_types": MIXED}),
    "gemma": ("gemma", {"head_dim": 32}),
    "gemma2": ("gemma2", {"head_dim": 32, "sliding_window": 24, "query_pre_attn_scalar": 20}),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 32, "sliding_window": 20, "query_pre_attn_scalar": 20, "layer_types": MIXED},
    ),
    "gemma3, linear rope, caps": (
        "gemma3_text",
        {
            "head_dim": 16,
            "sliding_window": 20,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default"}},
            "final_logit_softcapping": 20.0,
        },
    ),
    "phi3": ("phi3", {}),
    "phi3, window": ("phi3", {"sliding_window": 24}),
    "phi4-mini": (
        "phi3",
        {
            "rope_parameters": LONGROPE,
            "partial_rotary_factor": 0.75,
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 128,
            "tie_word_embeddings": True,
        },
    ),
    "phi4-mini, beyond the original length": (
        "phi3",
        {
            "rope_parameters": LONGROPE,
            "partial_rotary_factor": 0.75,
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 64,
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "smollm3, interval": ("smollm3", {"no_rope_layer_interval": 2}),
    "granite": ("granite", MULTIPLIERS),
    "olmo": ("olmo", {}),
    "olmo, clipped, biases": ("olmo", {"clip_qkv": 1.0, "attention_bias": True, "tie_word_embeddings": True}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 24, "layer_types": MIXED}),
    "olmo3, yarn": (
        "olmo3",
        {
            "sliding_window": 24,
            "layer_types": MIXED,
            "rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_type": "default"}},
        },
    ),
    "arcee": ("arcee", {}),
    "arcee, biases": ("arcee", {"attention_bias": True, "mlp_bias": True, "hidden_act": "relu"}),
    "seed_oss": ("seed_oss", {"head_dim": 24}),
    "seed_oss, other biases": (
        "seed_oss",
        {"head_dim": 16, "attention_bias": False, "attention_out_bias": True, "mlp_bias": True},
    ),
    "cohere": ("cohere", {"logit_scale": 0.5}),
    "cohere, norms of heads": ("cohere", {"use_qk_norm": True, "attention_bias": True, "tie_word_embeddings": False}),
    "cohere2": ("cohere2", {"sliding_window": 24, "layer_types": MIXED, "logit_scale": 0.25}),
    "nemotron": ("nemotron", {}),
    "nemotron, biases": ("nemotron", {"attention_bias": True, "mlp_bias": True, "partial_rotary_factor": 1.0}),
    "helium": ("helium", {"head_dim": 16}),
    "helium, biases": (
        "helium",
        {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "phi": ("phi", {"tie_word_embeddings": False}),
    "phi, norms of heads": ("phi", {"tie_word_embeddings": False, "qk_layernorm": True}),
    "glm": ("glm", {"head_dim": 16}),
    "glm4": ("glm4", {"head_dim": 16}),
    "stablelm": ("stablelm", {}),
    "stablelm, norms of heads": ("stablelm", {"qk_layernorm": True}),
    "stablelm, side by side": ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True}),
    "starcoder2": ("starcoder2", {}),
    "starcoder2, window, no biases": ("starcoder2", {"sliding_window": 24, "use_bias": False}),
    "exaone4": ("exaone4", {"sliding_window": 24, "sliding_window_pattern": 2}),
    "exaone4, no windows": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "ernie4_5": ("ernie4_5", {"head_dim": 16}),
    "ernie4_5, biases": ("ernie4_5", {"head_dim": 32, "use_bias": True}),
    "internlm3": ("internlm3", {"head_dim": 24}),
    "hunyuan": ("hunyuan_v1_dense", {"head_dim": 16}),
    "hunyuan, alpha": (
        "hunyuan_v1_dense",
        {
            "head_dim": 16,
            "rope_parameters": {"rope_type": "dynamic", "factor": 1.0, "alpha": 1000.0, "rope_theta": 1e4},
        },
    ),
}
ELSEWHERE = {
    "minicpm",
    "internlm2",
    "chatglm",
}  # families whose code transformers does not have: below, beside one that it has
TOKENS = 100
IDS = np.random.default_rng(1).integers(0, SMALL["vocab_size"], TOKENS).tolist()
FLOATS: dict[str, Any] = {"hidden_state_type": "fp32", "weight_type": "fp32", "post_weight_type": "fp32"}
GROUPS: dict[str, Any] = {"prefill_len": 16, "kv_cache_len": 127, "last_kv_cache_len": (16, 48)}
Particular = dict[str, Any]


def random_model(kind: str, particular: Particular) -> Any:
    """A random model in float32, norms and biases random too; exact in bfloat16, as the bundle's embedding is."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **json.loads(json.dumps({**SMALL, **particular})))
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + (1 if "norm" in name else 0))
            parameter.copy_(parameter.bfloat16().float())
    return model


@torch.inference_mode()
def expected(model: Any) -> Any:
    return model(torch.tensor([IDS]), use_cache=False).logits[0].numpy()


def built(folder: Path, output: Path, **options: Any) -> Path:
    build.build(build.plan(build.Options(folder, output, **{**FLOATS, **GROUPS, **options})))
    return output


def worst(bundle: Path, logits: Any, engine: str) -> float:
    """The largest error over all tokens, relative to the largest logit."""
    ours = Model.load(Bundle.open(bundle), engine).forward(IDS, 0, logits="all")
    return float(np.abs(ours - logits).max() / np.abs(logits).max())


@pytest.mark.parametrize("row", ROWS)
def test_logits_are_transformers(row: str, tmp_path: Path) -> None:
    kind, particular = ROWS[row]
    model = random_model(kind, particular)
    model.save_pretrained(tmp_path / "hf")
    bundle, logits = built(tmp_path / "hf", tmp_path / "out"), expected(model)
    assert worst(bundle, logits, "ax") <= 1e-4
    assert worst(bundle, logits, "ort") <= 1e-4
    assert_same_in_company(bundle)


def assert_same_in_company(bundle: Path) -> None:
    """Every family can share its runs with other sequences, and a token has the same bits as alone."""
    first = Model.load(Bundle.open(bundle), "ax")
    sequences = [Sequence(first), Sequence(first.another()), Sequence(first.another())]
    batch, lengths = Batch(first, 64), (40, 1, 17)  # beyond the windows; one token; in between
    jobs = [Job(sequence, IDS[:count], 0) for sequence, count in zip(sequences, lengths, strict=True)]
    for job, seen in zip(jobs, batch.run(jobs), strict=True):
        assert isinstance(seen, Computed)
        assert np.array(list(seen.logits)).tobytes() == first.another().forward(job.tokens, 0, logits="all").tobytes()


def test_a_context_beyond_the_original_length_has_the_long_factors(tmp_path: Path) -> None:
    """Of longrope: the build says so, and the check asks the reference for the same."""
    kind, particular = ROWS["phi4-mini, beyond the original length"]
    random_model(kind, particular).save_pretrained(tmp_path / "hf")
    short = build.Options(tmp_path / "hf", tmp_path / "out", prefill_len=16, kv_cache_len=63)
    assert not build.plan(short).notices
    plan = build.plan(replace(short, kv_cache_len=127, **FLOATS))
    (notice,) = plan.notices
    assert "long_factor at all positions" in notice
    assert "--kv_cache_len up to 63" in notice
    build.build(plan)
    check.check(plan, 1, "", lambda line: None)


# Families whose code transformers does not have, beside one that computes the same: its weights under other names.


def minicpm(tensors: Tensors, config: Particular) -> tuple[Tensors, Particular]:
    """Granite with the multipliers that minicpm's keys make."""
    values = {key: value for key, value in config.items() if key not in MULTIPLIERS}
    more = {
        "scale_emb": 12,
        "scale_depth": 0.22 * 2**0.5,
        "dim_model_base": 16,
        "architectures": ["MiniCPMForCausalLM"],
    }
    return tensors, {**values, **more, "tie_word_embeddings": False}


def internlm2(tensors: Tensors, config: Particular) -> tuple[Tensors, Particular]:
    """Llama with q, k and v of each group stored together."""
    renamed = {
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "model.tok_embeddings",
        "lm_head": "output",
    }
    found = {}
    for name, tensor in tensors.items():
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        if "_proj" not in name:
            found[name] = tensor
    for layer in range(2):
        for kind in ("weight", "bias"):
            parts = [tensors[f"model.layers.{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            grouped = [part.reshape(2, -1, 16, *part.shape[1:]) for part in parts]
            found[f"model.layers.{layer}.attention.wqkv.{kind}"] = torch.cat(grouped, 1).reshape(
                -1, *parts[0].shape[1:]
            )
    return found, {**config, "bias": True}


def chatglm(tensors: Tensors, config: Particular) -> tuple[Tensors, Particular]:
    """GLM under ChatGLM's names."""
    renamed = {
        "model.layers": "transformer.encoder.layers",
        "self_attn.o_proj": "self_attention.dense",
        "mlp.gate_up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
        "model.embed_tokens": "transformer.embedding.word_embeddings",
        "model.norm": "transformer.encoder.final_layernorm",
        "lm_head": "transformer.output_layer",
    }
    found = {"transformer.rotary_pos_emb.inv_freq": torch.ones(4)}
    for name, tensor in tensors.items():
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        if "_proj" not in name:
            found[name] = tensor
    for layer in range(2):
        for kind in ("weight", "bias"):
            parts = [tensors[f"model.layers.{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            name = f"transformer.encoder.layers.{layer}.self_attention.query_key_value.{kind}"
            found[name] = torch.cat(parts)
    return found, {
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_layers": 2,
        "num_attention_heads": 4,
        "multi_query_group_num": 2,
        "kv_channels": 16,
        "padded_vocab_size": 96,
        "seq_length": 128,
        "layernorm_epsilon": config["rms_norm_eps"],
        "add_qkv_bias": True,
        "rope_ratio": 50.0,
    }


Tensors = dict[str, Any]
TWINS: dict[str, tuple[str, Particular, Callable[[Tensors, Particular], tuple[Tensors, Particular]]]] = {
    "minicpm": ("granite", {**MULTIPLIERS, "attention_multiplier": 0.25}, minicpm),
    "internlm2": ("llama", {"attention_bias": True}, internlm2),
    "chatglm": ("glm", {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, chatglm),
}


@pytest.mark.parametrize("kind", TWINS)
def test_logits_are_those_of_the_same_tensors_elsewhere(kind: str, tmp_path: Path) -> None:
    twin, particular, rearranged = TWINS[kind]
    model = random_model(twin, particular)
    tensors, config = rearranged(model.state_dict(), model.config.to_dict())
    folder = tmp_path / "hf"
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    bundle, logits = built(folder, tmp_path / "out"), expected(model)
    assert worst(bundle, logits, "ax") <= 1e-4
    assert worst(bundle, logits, "ort") <= 1e-4


def test_every_family_has_a_row() -> None:
    inside = {name for name, family in families.FAMILIES.items() if family.inside.keys() & multimodal.KINDS.keys()}
    assert {kind for kind, _ in ROWS.values()} | TWINS.keys() | inside == families.FAMILIES.keys()
    assert multimodal.KINDS.keys() == {kind for family in families.FAMILIES.values() for kind in family.inside}

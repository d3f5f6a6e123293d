"""The table of healthy bundles besides those of conftest.py: families, types, shapes, checkpoints, tokenizers."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import load_file

from tests.axc import tokenizer_kinds as kinds
from tests.doctor import checkpoints
from tests.doctor.checkpoints import LLAMA3_ROPE

Make = Callable[[Path, Path], Path]


@dataclass(frozen=True)
class Healthy:
    """A healthy bundle: `make(folder, source)` makes the checkpoint from the shipped one, `options` are build options.

    `left`: the stage that `axrun doctor` cannot examine, because the figures have nothing for it.
    """

    name: str
    make: Make
    options: dict[str, Any] = field(default_factory=dict)
    left: str = ""


def types(hidden: str, layers: str, head: str = "") -> dict[str, Any]:
    return {"hidden_state_type": hidden, "weight_type": layers, "post_weight_type": head or layers}


def groups(prefill: int, context: int, *histories: int) -> dict[str, Any]:
    return {"prefill_len": prefill, "kv_cache_len": context, "last_kv_cache_len": histories}


def shipped(folder: Path, source: Path) -> Path:
    """The shipped checkpoint itself; not copied, so that its reference is cached."""
    return source


def random(family: str, dtype: torch.dtype = torch.bfloat16, shard: str = "5GB", **config: Any) -> Make:
    """A random model with the shipped tokenizer."""

    def make(folder: Path, source: Path) -> Path:
        checkpoints.save(folder, {"model_type": family, **config}, dtype, max_shard_size=shard)
        return checkpoints.with_text(folder, source)

    return make


llama, qwen2 = functools.partial(random, "llama"), functools.partial(random, "qwen2")


def as_bin(make: Make, *shards: str) -> Make:
    """The same weights as .bin files of torch, in one file or several."""

    def rewritten(folder: Path, source: Path) -> Path:
        make(folder, source)
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = shards or ("pytorch_model.bin",)
        parts = {name: dict(list(weights.items())[number :: len(names)]) for number, name in enumerate(names)}
        for name, part in parts.items():
            torch.save(part, folder / name)
        if shards:
            index = {"metadata": {}, "weight_map": {tensor: name for name, part in parts.items() for tensor in part}}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        return folder

    return rewritten


def text(kind: Callable[[Path], Path], **config: Any) -> Make:
    """A small Llama with the tokenizer `kind`; control tokens are defined by the tokenizer's files only."""

    def make(folder: Path, source: Path) -> Path:
        kind(folder)
        ids = {"bos_token_id": None, "eos_token_id": None}
        return checkpoints.save(folder, {"model_type": "llama", "num_hidden_layers": 1, **ids, **config})

    return make


def sentencepiece_model(folder: Path) -> Path:
    """A tokenizer with tokenizer.model only."""
    kinds.save(folder, None, kinds.LLAMA2, tokenizer_class="LlamaTokenizer", **kinds.LLAMA)
    (folder / "corpus.txt").write_text("\n".join(kinds.CORPUS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=320,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    for name in ("tokenizer.vocab", "corpus.txt"):
        (folder / name).unlink()
    return folder


def disagreeing_stops(folder: Path, source: Path) -> Path:
    """generation_config.json, config.json and the template name different stop tokens."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 637}))
    return folder


def with_a_day(folder: Path) -> Path:
    """The template writes the date, so the figures have no prompts."""
    return kinds.save(folder, kinds.byte_level(), "{{ strftime_now('%d %b %Y') }}" + kinds.CHATML)


FULL: dict[str, Any] = {"use_sliding_window": False}
WINDOW: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 1}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
GRANITE: dict[str, Any] = {"attention_multiplier": 0.25}
MULTIPLIERS: dict[str, Any] = {"embedding_multiplier": 12.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1}
GEMMA3: dict[str, Any] = {
    "head_dim": 32,
    "sliding_window": 20,
    "layer_types": ["sliding_attention", "full_attention"],
}
SMOLLM3: dict[str, Any] = {"no_rope_layers": [1, 1], "tie_word_embeddings": True, "pad_token_id": None}
S4 = types("bf16", "s4")
FP32 = types("fp32", "fp32")
HALVES = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
TEXTS = {
    **{name: kind for name, kind in kinds.KINDS.items() if kind is not kinds.KINDS["template with a date"]},
    "tokenizer.model": sentencepiece_model,
}
HEALTHY: tuple[Healthy, ...] = (
    Healthy("shipped, bf16", shipped, {**types("bf16", "bf16"), **groups(32, 255, 32)}),
    Healthy("shipped, fp16", shipped, {**types("fp16", "fp16"), **groups(16, 127)}),
    Healthy("shipped, s8 in fp16", shipped, {**types("fp16", "s8"), **groups(64, 255)}),
    Healthy("shipped, s8 in fp32", shipped, {**types("fp32", "s8"), **groups(16, 63, 16)}),
    Healthy("shipped, s4 in fp16", shipped, {**types("fp16", "s4", "s8"), **groups(16, 63, 16)}),
    Healthy("shipped, s4 in fp32, head bf16", shipped, {**types("fp32", "s4", "bf16"), **groups(16, 63)}),
    Healthy("shipped, fp8", shipped, {**types("bf16", "fp8_e4m3", "fp8_e5m2"), **groups(16, 63)}),
    Healthy("shipped, bf16 in fp32", shipped, {**types("fp32", "bf16"), **groups(32, 127, 64)}),
    Healthy("shipped, fp16 in bf16", shipped, {**types("bf16", "fp16", "fp32"), **groups(32, 127, 64)}),
    Healthy("shipped, fp32 in bf16", shipped, {**types("bf16", "fp32", "s4"), **groups(32, 127)}),
    Healthy("shipped, no prefill", shipped, groups(0, 63)),
    Healthy("shipped, no prefill, defaults", shipped),
    Healthy("shipped, the whole context", shipped, groups(128, 1023, 128, 512)),
    Healthy("shipped, five groups", shipped, groups(16, 127, 16, 32, 48)),
    Healthy("shipped, post_topk", shipped, {**groups(32, 127), "post_topk": 10}),
    Healthy("shipped, AX620E", shipped, {**groups(32, 127), "chip": "AX620E"}),
    Healthy("shipped, stops that disagree", disagreeing_stops, groups(32, 127)),
    Healthy("qwen2, untied", qwen2(tie_word_embeddings=False), groups(16, 63, 16)),
    Healthy("qwen2, every head its own K/V", qwen2(num_key_value_heads=4), {**FP32, **groups(16, 63)}),
    Healthy("qwen2, one K/V head", qwen2(num_key_value_heads=1), groups(16, 63, 16, 32)),
    Healthy("qwen2, window not in use", qwen2(**FULL, sliding_window=8, max_window_layers=1), groups(16, 63)),
    Healthy("qwen2, window in use", qwen2(**WINDOW), groups(16, 99, 16)),
    Healthy("qwen2, base 1e6", qwen2(rope_parameters={"rope_type": "default", "rope_theta": 1e6}), groups(16, 63)),
    Healthy("qwen2, linear rope", qwen2(rope_parameters=LINEAR), groups(16, 63, 16)),
    Healthy("qwen2, eps 1e-5, six layers", qwen2(rms_norm_eps=1e-5, num_hidden_layers=6), groups(16, 63)),
    Healthy("qwen2, float16 files", qwen2(torch.float16), {**types("fp16", "fp16"), **groups(16, 63)}),
    Healthy("qwen2, float32 files", qwen2(torch.float32), {**types("bf16", "bf16"), **groups(16, 63)}),
    Healthy("qwen2, .bin", as_bin(qwen2(tie_word_embeddings=False)), groups(16, 63)),
    Healthy("qwen2, shards", qwen2(shard="100KB"), groups(16, 63)),
    Healthy("llama 2", llama(tie_word_embeddings=False, num_key_value_heads=4), groups(16, 63, 16)),
    Healthy("llama 3.2", llama(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True), groups(16, 127, 32)),
    Healthy("llama 3.2, fp32", llama(torch.float32, rope_parameters=LLAMA3_ROPE), {**FP32, **groups(16, 63)}),
    Healthy("llama, linear rope", llama(rope_parameters=LINEAR), {**types("fp16", "s8"), **groups(16, 63)}),
    Healthy("llama, biases everywhere", llama(attention_bias=True, mlp_bias=True), groups(16, 63)),
    Healthy("llama, biases, fp32", llama(attention_bias=True), {**FP32, **groups(16, 63)}),
    Healthy("llama, head_dim 48", llama(head_dim=48), groups(16, 63, 16)),
    Healthy("llama, three query heads to one", llama(hidden_size=96, num_attention_heads=6), groups(16, 63)),
    Healthy("llama, odd sizes, s4", llama(hidden_size=72, intermediate_size=100), {**S4, **groups(16, 63)}),
    Healthy("llama, .bin shards", as_bin(llama(), *HALVES), groups(16, 63)),
    Healthy("llama, one layer, fp16", llama(num_hidden_layers=1), {**types("fp16", "fp16"), **groups(0, 31)}),
    Healthy("mistral", random("mistral", sliding_window=None), {**groups(16, 63)}),
    Healthy("mistral, a window", random("mistral", sliding_window=64), {**groups(16, 63, 16)}),
    Healthy("smollm3", random("smollm3", **SMOLLM3), {**groups(16, 63)}),
    Healthy("granite", random("granite", **GRANITE), {**FP32, **groups(16, 63)}),
    Healthy("granite, multipliers", random("granite", **MULTIPLIERS), groups(16, 63)),
    Healthy("qwen3", random("qwen3", head_dim=24, tie_word_embeddings=True), groups(16, 63, 16)),
    Healthy("gemma3, windows", random("gemma3_text", **GEMMA3), groups(16, 127, 32)),
    Healthy("gemma2, caps", random("gemma2", head_dim=32, sliding_window=24), {**FP32, **groups(16, 63)}),
    Healthy("phi3, stored together", random("phi3", partial_rotary_factor=0.75, pad_token_id=None), groups(16, 63)),
    Healthy("phi", random("phi"), {**FP32, **groups(16, 63)}),
    Healthy("glm4, neighbours", random("glm4", head_dim=16, pad_token_id=None), groups(16, 63)),
    Healthy("olmo2", random("olmo2"), {**FP32, **groups(16, 63)}),
    *(Healthy(f"text: {name}", text(kind), groups(16, 47)) for name, kind in TEXTS.items()),
    Healthy("text: template with a day", text(with_a_day), groups(16, 47), "template"),
    *(Healthy(f"mended text: {name}", text(kind), groups(16, 47)) for name, kind in kinds.MENDED.items()),
)  # fmt: skip

# Similar to another entry, with a different shape; only run by `make test-all`.
SYSTEM_ONLY = frozenset(
    {
        "shipped, s4 in fp16",
        "shipped, bf16 in fp32",
        "shipped, fp16 in bf16",
        "shipped, fp32 in bf16",
        "shipped, no prefill, defaults",
        "shipped, five groups",
        "qwen2, every head its own K/V",
        "qwen2, window not in use",
        "qwen2, eps 1e-5, six layers",
        "qwen2, float32 files",
        "qwen2, untied",
        "llama 3.2",
        "llama, biases everywhere",
        "llama, .bin shards",
        "mistral",
        "text: byte-level, prefix space",
        "text: metaspace first",
    }
)

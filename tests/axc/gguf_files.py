"""Small GGUF files of random models, written with the gguf package in the layout of llama.cpp's converter."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import transformers
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from tokenizers import models, pre_tokenizers, trainers

from tests.axc.as_transformers import random_model

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.06,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
}
ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = (
    "The quick brown fox jumps over the lazy dog. It's 1234 dogs!  And\n\n they'll count 42 of them, "
    "na\u00efve \u6f22\u5b57."
)
# offsets of a block's float16 scales, for types that the package reads but does not write
SCALES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    **dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)),
    "NVFP4": (),  # bytes, all of which are finite
}


@functools.cache
def byte_level() -> tuple[list[str], list[str]]:
    """Tokens and merges of a small byte-level BPE."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=list(CONTROL), initial_alphabet=alphabet)
    made.train_from_iterator([WORDS] * 4, trainer)
    model = json.loads(made.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tokens, [" ".join(pair) for pair in model["merges"]]


def sentencepiece() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and kinds of a small SentencePiece BPE."""
    tokens, scores, kinds = ["<unk>", "<s>", "</s>"], [0.0] * 3, [2, 3, 3]
    for byte in range(256):
        tokens.append(f"<0x{byte:02X}>")
        scores.append(0.0)
        kinds.append(6)
    pieces = [
        "\u2581t",
        "he",
        "\u2581the",
        "qu",
        "ck",
        "\u2581qu",
        "in",
        "er",
        "\u2581d",
        "og",
        "\u2581dog",
        "\u2581\u2581",
    ]
    pieces += sorted({*WORDS.replace(" ", "\u2581")})
    for index, piece in enumerate(pieces):
        tokens.append(piece)
        scores.append(-float(index))
        kinds.append(1)
    return tokens, scores, kinds


def permuted(weights: NDArray[Any], heads: int) -> NDArray[Any]:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    cut = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return cut.swapaxes(1, 2).reshape(weights.shape)


def packed(weights: NDArray[np.float32], kind: Kind, seed: int) -> NDArray[Any]:
    """A tensor quantised by the package, or random blocks for types that it cannot write."""
    if kind.name not in SCALES:
        return np.asarray(gguf.quants.quantize(weights, kind))
    block, size = gguf.GGML_QUANT_SIZES[kind]
    draw = np.random.default_rng(seed)
    blocks = draw.integers(0, 256, (weights.size // block, size), np.uint8)
    for at in SCALES[kind.name]:
        scales = draw.uniform(1e-4, 4e-4, len(blocks)) * draw.choice([-1, 1], len(blocks))
        blocks[:, at : at + 2] = scales.astype(np.float16).view(np.uint8).reshape(-1, 2)
    return blocks.reshape(weights.shape[0], -1)


def model(kind: str, changes: Mapping[str, Any] | None = None, vocabulary: int | None = None) -> Any:
    """The random model of an architecture that `write` writes."""
    heads = {"head_dim": 64} if kind == "qwen3" else {}
    values = {**SIZES, **heads, **(changes or {}), "vocab_size": vocabulary or len(byte_level()[0])}
    return random_model(transformers.AutoConfig.for_model(kind, **values))


def write(
    path: Path,
    kind: str = "llama",
    stored: Kind = Kind.F32,
    head: Kind | None = None,
    changes: Mapping[str, Any] | None = None,
    pre: str | None = None,
    rope: NDArray[np.float32] | None = None,
    keys: Mapping[str, Any] | None = None,
    alignment: int | None = None,
) -> Path:
    """A random model of an architecture: its matrices in `stored`, its head and embedding in `head`."""
    spm = pre == "spm"
    tokens, merges = byte_level()
    pieces, scores, kinds = sentencepiece()
    names = pieces if spm else tokens
    made = model(kind, changes, len(names))
    config = made.config
    writer = gguf.GGUFWriter(path, kind)
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    if kind == "llama":
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
        writer.add_vocab_size(len(names))
    if kind == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_chat_template(TEMPLATE)
    if spm:
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(scores)
        writer.add_token_types(kinds)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre or {"llama": "llama-bpe"}.get(kind, "qwen2"))
        writer.add_token_types([3 if token in CONTROL else 1 for token in tokens])
        writer.add_token_merges(merges)
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(False)
    writer.add_token_list(names)
    add: dict[type, Any] = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in (keys or {}).items():
        add[type(value)](key, value)
    if rope is not None:
        writer.add_tensor("rope_freqs.weight", rope)
    named = gguf.get_tensor_name_map(ARCHITECTURES[kind], config.num_hidden_layers)
    for seed, (name, parameter) in enumerate(made.state_dict().items()):
        data = parameter.numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if kind == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            data = permuted(data, heads)
        to = str(named.get_name(name, try_suffixes=(".weight", ".bias")))
        outer = name in ("model.embed_tokens.weight", "lm_head.weight")
        form = Kind.F32 if data.ndim == 1 else head if outer and head is not None else stored
        writer.add_tensor(to, packed(np.ascontiguousarray(data), form, seed), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

"""Small embedding checkpoints like Qwen3-Embedding: without a head, with the files of sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import processors

from axc import build

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
}
FP32: dict[str, Any] = dict.fromkeys(("hidden_state_type", "weight_type", "post_weight_type"), "fp32")
END = "<|endoftext|>"
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]
MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
QUERY = "Instruct: Find the answer\nQuery:"


def write(folder: Path, tokenizer: Path, mode: str = "lasttoken", normalize: bool = True) -> Path:
    """A random Qwen3 model with the tokenizer of another folder, which appends the end token to each text."""
    folder.mkdir(parents=True)
    backend = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    end = backend.token_to_id(END)
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
            processors.TemplateProcessing(single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, end)]),
        ]
    )
    backend.save(str(folder / "tokenizer.json"))
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    dump(folder / "tokenizer_config.json", {**settings, "model_max_length": 131072, "padding_side": "left"})
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=json.loads((tokenizer / "config.json").read_text())["vocab_size"], **SMALL
    )
    model = transformers.AutoModel.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())  # as the embedding of a bundle
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    dump(folder / "config.json", {**config, "architectures": ["Qwen3ForCausalLM"]})
    dump(folder / "modules.json", MODULES if normalize else MODULES[:2])
    modes = {f"pooling_mode_{name}": name.startswith(mode) and name != "mean_sqrt_len_tokens" for name in MODES}
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": SMALL["hidden_size"], **modes, "include_prompt": True}
    dump(folder / "1_Pooling" / "config.json", pooling)
    prompts = {"query": QUERY, "document": ""}
    model_config = {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    dump(folder / "config_sentence_transformers.json", model_config)
    return folder


def dump(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2))


def build_fp32(checkpoint: Path, output: Path) -> Path:
    """A bundle in float32, with a context of 255 tokens."""
    options: dict[str, Any] = {"prefill_len": 32, "kv_cache_len": 255, "last_kv_cache_len": (32, 128), **FP32}
    build.build(build.plan(build.Options(input_path=checkpoint, output_path=output, **options)))
    return output

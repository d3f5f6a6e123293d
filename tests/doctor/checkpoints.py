"""Tiny random checkpoints saved by transformers, with random weights, biases and norms."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "vocab.json", "merges.txt")
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 640,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 637,
    "eos_token_id": 639,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
BOS_CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save(folder: Path, config: dict[str, Any], dtype: torch.dtype = torch.float32, **how: Any) -> Path:
    """A checkpoint without a tokenizer; `config`: keys of config.json, `how`: options of save_pretrained."""
    torch.manual_seed(0)
    values = {**SMALL, **config}
    wanted = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    model = transformers.AutoModelForCausalLM.from_config(wanted, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + (1 if "norm" in name else 0))
    model.to(dtype).save_pretrained(folder, **how)
    return folder


def with_text(folder: Path, source: Path, template: str | None = None, **settings: Any) -> Path:
    """Adds the tokenizer of `source`, optionally with another template and settings."""
    for name in TEXT_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    path = folder / "tokenizer_config.json"
    values = {**json.loads(path.read_text()), **settings}
    if template is not None:
        values["chat_template"] = template
    path.write_text(json.dumps(values))
    return folder


def llama(folder: Path, source: Path) -> Path:
    """Float32, untied head, grouped-query attention, scaled rope; the template starts with BOS."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "max_position_embeddings": 512}
    config = {"model_type": "llama", **shape, "tie_word_embeddings": False, "rope_parameters": LLAMA3_ROPE}
    save(folder, {**config, "rms_norm_eps": 1e-5})
    return with_text(folder, source, BOS_CHATML, bos_token="<|endoftext|>", tokenizer_class="PreTrainedTokenizerFast")

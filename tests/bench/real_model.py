"""SmolLM2-135M-Instruct with its channels in another order: a real model for measuring quantisers on.

The package that models/smollm2-135m.toml names stores it on a 4-bit grid, which flatters a quantiser that uses it too.
Other orders of hidden channels, of MLP neurons and of each head's value channels change nothing that the
model computes, keep every weight, and break up the blocks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from axc.checkpoints import EMBEDDING, Checkpoint, widen
from axc.weights import float32
from axc.weights.sources import Stored

TEXTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def permuted(source: Path, folder: Path) -> Path:
    """A bfloat16 checkpoint of the GGUF at `source`, in `folder`."""
    checkpoint = Checkpoint.open(source)
    folder.mkdir(parents=True)
    for name in TEXTS:
        if (path := checkpoint.folder / name).is_file():
            (folder / name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    stored = {
        name: torch.from_numpy(float32(name, Stored(name, tensor.shape), checkpoint))
        for name, tensor in checkpoint.tensors.items()
    }
    save_file(_reordered(stored, config), folder / "model.safetensors", {"format": "pt"})
    return folder


def _reordered(stored: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    order = np.random.default_rng(0).permutation
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    hidden = order(config["hidden_size"])
    made = {name: value[hidden] for name, value in stored.items() if "norm" in name}
    made[EMBEDDING] = stored[EMBEDDING][:, hidden]
    for layer in range(config["num_hidden_layers"]):
        inner = order(config["intermediate_size"])
        value = [order(size) for _ in range(kv)]
        rows = np.concatenate([own + head * size for head, own in enumerate(value)])
        columns = np.concatenate([value[head * kv // heads] + head * size for head in range(heads)])
        everything = slice(None)
        for part, (out, into) in {
            "self_attn.q_proj": (everything, hidden),
            "self_attn.k_proj": (everything, hidden),
            "self_attn.v_proj": (rows, hidden),
            "self_attn.o_proj": (hidden, columns),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }.items():
            name = f"model.layers.{layer}.{part}.weight"
            made[name] = stored[name][out][:, into]
    return {name: value.bfloat16().contiguous() for name, value in made.items()}


NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def as_gguf(folder: Path, path: Path) -> Path:
    """The checkpoint as a float32 GGUF without a vocabulary, for llama.cpp to quantise."""
    config, checkpoint = json.loads((folder / "config.json").read_text()), Checkpoint.open(folder)
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    for name, tensor in checkpoint.tensors.items():
        values = widen(checkpoint.rows(name, 0, tensor.shape[0]), tensor.dtype)
        if name in (EMBEDDING, "model.norm.weight"):
            writer.add_tensor("token_embd.weight" if name == EMBEDDING else "output_norm.weight", values)
            continue
        _, _, index, rest = name.split(".", 3)
        part = rest.removesuffix(".weight")
        if part in ("self_attn.q_proj", "self_attn.k_proj"):  # llama.cpp's rotary embedding is interleaved
            count = heads if "q_proj" in part else kv
            values = values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(f"blk.{index}.{NAMES[part]}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

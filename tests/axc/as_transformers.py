"""Computes logits of a checkpoint with transformers and with our compiler and runner, for tests that compare them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from axc import build, families
from axrun.format.bundle import Bundle
from axrun.model import Model

VOCABULARY = 96
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
DIMENSIONS = {key: value for key, value in SMALL.items() if not key.endswith("_id") and key != "initializer_range"}
WHOLE = {**DIMENSIONS, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 5e5, "tie_word_embeddings": True}
PLAIN = ["llama", "qwen2"]
AS_ITSELF = ["llama", "qwen2", "mistral", "smollm3", "granite"]


IDS = np.random.default_rng(1).integers(3, VOCABULARY, 40)
FP32: dict[str, Any] = {"hidden_state_type": "fp32", "weight_type": "fp32", "post_weight_type": "fp32"}
AUTO: Any = transformers.AutoModelForCausalLM


def random_model(config: Any, seed: int = 0, auto: Any = AUTO) -> Any:
    """A random model with random norms and biases; exact in bfloat16, like a bundle's embedding."""
    torch.manual_seed(seed)
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + (1 if "norm" in name else 0))
            parameter.copy_(parameter.bfloat16().float())
    return model


def change_config(folder: Path, changes: Mapping[str, Any], without: tuple[str, ...] = ()) -> None:
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if key not in without}))


@torch.inference_mode()
def logits_of(model: Any, ids: NDArray[Any] = IDS) -> NDArray[np.float32]:
    return np.asarray(model(torch.from_numpy(ids)[None]).logits[0].float().numpy())


def theirs(folder: Path, ids: NDArray[Any] = IDS) -> NDArray[np.float32]:
    """Logits of transformers."""
    return logits_of(AUTO.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval(), ids)


def plan(folder: Path, output: Path, **options: Any) -> build.Plan:
    return build.plan(build.Options(folder, output, **{"prefill_len": 16, "kv_cache_len": 63, **FP32, **options}))


def ours(folder: Path, output: Path, ids: NDArray[Any] = IDS, **options: Any) -> NDArray[np.float32]:
    """Ours: compiled in float32 and run, prefill and decode."""
    planned = plan(folder, output, **options)
    build.build(planned)
    logits: NDArray[np.float32] = Model.load(Bundle.open(output)).forward(ids.tolist(), 0, logits="all")
    return logits


def same(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    return bool(np.abs(a - b).max() <= 1e-4 * np.abs(b).max())


def read(values: dict[str, Any], kind: str, family: str | None = None) -> Any:
    return families.read_config({"model_type": kind, **values}, Path("config.json"), family)[1]


def copy_of(models: dict[str, tuple[Path, Any]], kind: str, to: Path, changes: dict[str, Any]) -> Path:
    to.mkdir()
    for path in models[kind][0].iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    change_config(to, changes)
    return to

"""A second, independent reader of LoRA adapters: merges them into transformers' model like peft's merge_and_unload."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

SAID = "merged into the reference by axc.lora_reading, in float32"


@torch.no_grad()
def merge(model: Any, folder: Path, weight: float) -> None:
    """W + weight * scaling * B A for every module that the adapter in `folder` has."""
    says = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, a in tensors.items():
        module, found, _ = name.partition(".lora_A.")
        if not found:
            continue
        path = module.removeprefix("base_model.model.")
        if OTHERS.match(path):
            continue
        b = tensors[f"{module}.lora_B.weight"]
        rank = _pattern(says.get("rank_pattern") or {}, path, says["r"])
        alpha = _pattern(says.get("alpha_pattern") or {}, path, says["lora_alpha"])
        scaling = alpha / (rank**0.5 if says.get("use_rslora") else rank)
        parameter = _submodule(model, path).weight
        change = (b.double() @ a.double()) * (weight * scaling)
        parameter.data = (parameter.data.double() + change).float()


# parts of a multimodal model that text does not reach
OTHERS = re.compile(r"(model\.)?(visual|vision_tower|multi_modal_projector)\.")
# how transformers 4 called the text model in it, and saved many adapters
OLDER = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head": "lm_head",
    "model.layers.": "model.language_model.layers.",
}


def _submodule(model: Any, path: str) -> Any:
    """The module of a path, by today's name or by that of transformers 4. Raises AttributeError."""
    newer = (new + path.removeprefix(old) for old, new in OLDER.items() if path.startswith(old))
    known = dict(model.named_modules())
    return model.get_submodule(next((name for name in (path, *newer) if name in known), path))


def _pattern(patterns: Mapping[str, Any], module: str, usual: Any) -> Any:
    """`get_pattern_key` of peft, whose patterns are regular expressions. Raises ValueError for more than a name."""
    if odd := [key for key in patterns if not re.fullmatch(r"\^?[\w.\\]+", key)]:
        raise ValueError(f"the pattern {odd[0]!r:.60} is no plain name of a module")
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), usual)

"""Loads a GGUF file with transformers (config, weights, tokenizer), without our reader.

Parts of the file that transformers is known to ignore are corrected here, and reported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from axc.checkpoints.gguf import Model
from axc.checkpoints.gguf.tokenizer import CUTS, WHOLE_WORDS, cut

LOCAL: dict[str, Any] = {"local_files_only": True}
# of config.json; it builds every Llama without biases and with plain rotary frequencies, and Qwen3 with heads of 128
NOT_READ = ("rope_scaling", "attention_bias", "mlp_bias", "head_dim")


def possible() -> bool:
    """Whether torch is installed, which transformers needs to read a GGUF."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return False
    return True


def config(path: Path) -> tuple[Any, list[str]]:
    """The config, and remarks on it."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    found = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name, **LOCAL)
    ours = Model.open(path).config
    added = {key: ours[key] for key in NOT_READ if ours.get(key) and getattr(found, key, None) != ours[key]}
    if not added:
        return found, []
    if "rope_scaling" in added:
        added["rope_scaling"] = {**added["rope_scaling"], "rope_theta": ours["rope_theta"]}
    values = {**found.to_dict(), **added}
    remark = (
        f"transformers {transformers.__version__} does not read {', '.join(added)} of a GGUF: taken from our reading"
    )
    return CONFIG_MAPPING[found.model_type].from_dict(values), [remark]


def weights(path: Path, skeleton: Any) -> dict[str, Any]:
    """Dequantised float32 tensors by their names in `skeleton`."""
    import torch
    from transformers import modeling_gguf_pytorch_utils

    reader: Any = modeling_gguf_pytorch_utils
    shown, reader.tqdm = reader.tqdm, lambda tensors, **_: tensors  # its progress bar cannot be disabled otherwise
    try:
        found = reader.load_gguf_checkpoint(
            str(path), return_tensors=True, model_to_load=skeleton, torch_dtype=torch.float32
        )
    finally:
        reader.tqdm = shown
    tensors: dict[str, Any] = found["tensors"]
    return tensors


def stored_types(path: Path) -> set[Any]:
    """The element types of its matrices, float32 standing for those that are stored in blocks."""
    import torch
    from gguf import GGUFReader

    types = {"F16": torch.float16, "BF16": torch.bfloat16}
    tensors = [tensor for tensor in GGUFReader(path).tensors if len(tensor.shape) > 1]
    return {types.get(tensor.tensor_type.name, torch.float32) for tensor in tensors}


def tokenizer(path: Path) -> tuple[Any, list[str]]:
    """AutoTokenizer of the file, and remarks on it."""
    import transformers
    from transformers.integrations.gguf import gguf_tokenizer_mapping

    auto: Any = transformers.AutoTokenizer
    found = auto.from_pretrained(path.parent, gguf_file=path.name, **LOCAL)
    name = Model.open(path).cut
    if name is None or name not in CUTS or name == "gpt-2":
        return found, []
    remarks = []
    if name not in gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS:
        found.backend_tokenizer.pre_tokenizer = cut(name)
        remarks.append(
            f"tokenizer: transformers {transformers.__version__} does not know the pre-tokenizer {name} of this GGUF "
            "file: all else is compared, but not how text is split before BPE"
        )
    if name in WHOLE_WORDS:
        found.backend_tokenizer.model.ignore_merges = True
    return found, remarks

"""Compares the tensors that weight sources read with those of a checkpoint: names, shapes, element types."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from axc.checkpoints import HEAD, INFINITY, STORED_DTYPES, Checkpoint
from axc.weights import Shape, Source
from axrun.errors import BadInput

LAYER, FIRST_LAYER = re.compile(r"\.layers\.\d+\."), ".layers.0."


def reads(sources: Mapping[str, Source]) -> dict[str, Shape]:
    """The tensors that the sources read, with their shapes."""
    return {name: shape for source in sources.values() for name, shape in source.reads.items()}


def cross_check(checkpoint: Checkpoint, sources: Mapping[str, Source], redundant: tuple[str, ...], path: Path) -> None:
    """Raises BadInput naming tensors that are missing, unexpected or have a wrong shape or type.

    `redundant`: suffixes of tensors that a checkpoint may have but a build does not need. `path` is the config.json.
    """
    expected = reads(sources)
    stored = checkpoint.tensors
    wrong = [
        f"{name} has shape {list(stored[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    missing = [name for name in expected if name not in stored]
    # A stored head of a tied model equals the embedding, as checked by axc.config.
    unexpected = [name for name in stored if name not in expected and name != HEAD and not name.endswith(redundant)]
    odd = [name for name in expected if name in stored and stored[name].dtype not in INFINITY]
    lines = []
    if odd:
        lines.append(
            f"tensor {odd[0]} of {stored[odd[0]].file.name} is stored as {stored[odd[0]].dtype}; "
            f"expected one of {', '.join(STORED_DTYPES)}: give the original float checkpoint"
        )
    if wrong:
        more = f" ({len(wrong) - 1} more with wrong shapes)" if len(wrong) > 1 else ""
        lines.append(f"{path}: {wrong[0]}{more}")
    if missing:
        why = "it is incomplete, get it again" if checkpoint.gguf else "does config.json belong to it?"
        lines.append(f"{_count(missing)} missing from {checkpoint.path}: {_some(missing)}; {why}")
    if unexpected:
        deeper = all(LAYER.sub(FIRST_LAYER, name) in expected for name in unexpected)
        config = "block_count" if checkpoint.gguf else "config.json"
        why = f"does {config} name fewer layers than there are?" if deeper else "is model_type right?"
        lines.append(f"{_count(unexpected)} not of this architecture: {_some(unexpected)}; {why}")
    if lines:
        hint = _hint(missing, unexpected)
        raise BadInput("\n".join([*lines[:2], hint] if hint else lines[:3]))


# Patterns of unexpected tensor names that show how a checkpoint was saved, with advice.
ODD_NAMES = (
    (
        r"\.(lora_[AB]|lora_magnitude_vector|base_layer|modules_to_save)\.",
        "They belong to an adapter: merge it with merge_and_unload() and save again, or give it as --lora.",
    ),
    (
        r"\.(qweight|qzeros|scales|g_idx|weight_packed|weight_scale|weight_scale_inv|absmax|quant_map|biases)$",
        "They are quantised weights, but config.json has no quantization_config: give the original float checkpoint.",
    ),
    (r"^tok_embeddings\.|\.attention\.wq\.", "The names are Meta's: give the checkpoint in transformers' format."),
    (r"\.(LayerNorm)\.(gamma|beta)$|\.(gamma|beta)$", "Names in gamma and beta are from TensorFlow: save again."),
)
# Prefixes that wrappers add in a state_dict.
WRAPPERS = {
    "module.": "torch's DataParallel",
    "_orig_mod.": "torch.compile",
    "_forward_module.": "Lightning",
    "base_model.model.": "PEFT",
}


def _hint(missing: list[str], unexpected: list[str]) -> str | None:
    """Advice derived from the names of unexpected tensors: a common prefix, or another kind of checkpoint."""
    for pattern, words in ODD_NAMES:
        if any(re.search(pattern, name) for name in unexpected):
            return words
    for name in missing[:1]:
        for odd in unexpected:
            if odd.endswith(f".{name}"):
                prefix = odd.removesuffix(name)
                who = WRAPPERS.get(prefix, "a wrapper around the model")
                return f"Their names begin with {prefix!r:.60}, which {who} adds: save the inner model again."
    return None


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor{'s are' if len(names) > 1 else ' is'}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")

"""Loads the config of a checkpoint, and cross-checks it with the tensors that a build reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from axc import families
from axc.checkpoints import EMBEDDING, HEAD, INFINITY, Checkpoint, lora
from axc.checkpoints.json_files import read_config_json
from axc.families.family import ModelConfig
from axc.weights import Source
from axc.weights.cross_check import cross_check, reads


def load(
    checkpoint: Checkpoint,
    model_config: Path | None = None,
    model_type: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> ModelConfig:
    """The config of a checkpoint, cross-checked with the shapes of all its tensors.

    `model_config` replaces the checkpoint's config.json, `model_type` the type named in it. `say` gets a note on every
    key or file that is ignored or overridden, as in transformers.
    Raises BadInput naming tensors that are missing, unexpected or have the wrong shape.
    """
    path = model_config or (checkpoint.path if checkpoint.gguf else checkpoint.path / "config.json")
    values = dict(checkpoint.gguf.config) if checkpoint.gguf and not model_config else read_config_json(path)
    if checkpoint.aside:
        aside = ", ".join(checkpoint.aside[:4]) + (", ..." if len(checkpoint.aside) > 4 else "")
        say(f"weights: {checkpoint.source}, which transformers prefers; not read: {aside}")
    family, config = families.read_config(values, path, model_type, say)
    names = values.get("architectures")
    if checkpoint.others:
        say(f"weights: {checkpoint.others} tensors of other parts than the text model: not read")
    elif isinstance(names, list) and names and not any("CausalLM" in str(name) for name in names):
        say(f"config.json names {str(names[0])!r:.60}; built as a causal language model, as AutoModelForCausalLM does")
    if values.get("auto_map"):
        say(f"config.json has custom code (auto_map), which is not run: the model is read as {config.model_type}")
    config = _untied_if_head_differs(checkpoint, config, say)
    stored = checkpoint.tied() if config.tie_word_embeddings else checkpoint
    sources = family.weights(config)
    cross_check(_without_zero_biases(stored, sources, say), sources, family.redundant, path)
    for remark in (*checkpoint.remarks, *checkpoint.scale_remarks(), *checkpoint.lora_remarks()):
        say(remark)
    return config


def _without_zero_biases(
    checkpoint: Checkpoint, sources: Mapping[str, Source], say: Callable[[str], None]
) -> Checkpoint:
    """The checkpoint without the all-zero biases that some packages write for every quantised matrix."""
    expected, tensors = reads(sources), checkpoint.tensors
    idle = [
        name
        for name, stored in tensors.items()
        if name.endswith(".bias") and name not in expected and stored.dtype in INFINITY
        if (matrix := tensors.get(f"{name.removesuffix('bias')}weight")) and matrix.packed
        if all(not block.any() for _, block in checkpoint.blocks(name))
    ]
    if idle:
        many = f"{len(idle)} biases of quantised matrices are" if len(idle) > 1 else "1 bias of a quantised matrix is"
        say(f"{many} all zeros and not of this architecture: left out")
    return replace(checkpoint, tensors={name: stored for name, stored in tensors.items() if name not in idle})


def _untied_if_head_differs(checkpoint: Checkpoint, config: ModelConfig, say: Callable[[str], None]) -> ModelConfig:
    """Like transformers, unties a head that config.json ties if the stored head differs from the stored embedding.

    Raises BadInput if they differ only by an adapter.
    """
    stored = [checkpoint.tensors.get(name) for name in (EMBEDDING, HEAD)]
    if not config.tie_word_embeddings or None in stored:
        return config
    if any(tensor and (tensor.dtype not in INFINITY or len(tensor.shape) != 2) for tensor in stored):
        return replace(config, tie_word_embeddings=False)  # reported by the cross-check
    if checkpoint.equal(EMBEDDING, HEAD):
        return config
    if checkpoint.adapters and Checkpoint.open(checkpoint.path).equal(EMBEDDING, HEAD):
        for adapter in checkpoint.adapters:
            if not Checkpoint.open(checkpoint.path, (adapter,)).equal(EMBEDDING, HEAD):
                raise lora.tied_head(adapter)
    say(f"tie_word_embeddings is true, but the stored {HEAD} differs from {EMBEDDING}: used untied, as in transformers")
    return replace(config, tie_word_embeddings=False)

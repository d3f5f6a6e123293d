"""Writes the parts of a bundle besides axmodels and embedding: configs for three runners, tokenizer, manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from axc import axllm, hf_folder, identity, pooling
from axc.axllm import to_json
from axc.axmodel.writer import Written
from axc.calibration.file import CalibrationFile
from axc.checkpoints import Checkpoint, Lora
from axc.compile import Target
from axc.embed import BFLOAT16_FILE
from axc.families.family import ModelConfig
from axc.hf_folder import HfFolder
from axc.quantizer.kept import Kept
from axrun.errors import BadInput
from axrun.format.bundle import MANIFEST, SCHEMA, read_manifest, sha256


def input_files(checkpoint: Checkpoint) -> tuple[Path, ...]:
    """Every checkpoint file that a bundle is built from."""
    texts = () if checkpoint.gguf else (*hf_folder.input_files(checkpoint.path), *pooling.input_files(checkpoint.path))
    settings = () if checkpoint.settings_file is None else (checkpoint.settings_file,)
    return (*checkpoint.files, *settings, *texts, *(file for adapter in checkpoint.adapters for file in adapter.files))


def input_name(path: Path, folder: Path, adapters: Sequence[Lora]) -> str:
    """The manifest's name of a file of a checkpoint's folder, or of an adapter that is merged into it."""
    for number, adapter in enumerate(adapters, 1):
        if path in adapter.files:
            return f"lora{number}/{path.name}"
    in_module = path.name == "config.json" and path.parent != folder and path.is_relative_to(folder)
    return path.relative_to(folder).as_posix() if in_module else path.name


def finish(
    folder: Path,
    name: str,
    config: ModelConfig,
    target: Target,
    made: HfFolder,
    inputs: Mapping[str, Written],
    outputs: Mapping[str, Written],
    *,
    maker: str = "cpu",
    tools: Mapping[str, str] | None = None,
    kept: Mapping[str, Kept] = MappingProxyType({}),
    adapters: Sequence[Lora] = (),
    calibration: CalibrationFile | None = None,
    pooled: pooling.Pooling | None = None,
) -> dict[str, Any]:
    """Writes the manifest of all files in `folder` and returns it. Raises BadInput for the calibration of others.

    `inputs` and `outputs` are by file name; `outputs` are the axmodels and the embedding. `maker` names the compiler of
    the axmodels; the accuracy of another maker's weights is unknown and therefore omitted. `adapters` are merged into
    the weights. `pooled`: how an embedding model pools.
    """
    files = {file: {"sha256": written.sha256, "size": written.nbytes} for file, written in outputs.items()}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        file = path.relative_to(folder).as_posix()
        if file not in files and not path.name.startswith(".") and not file.endswith(".done"):
            files[file] = {"sha256": sha256(path), "size": path.stat().st_size}
    axmodels = {file: written for file, written in outputs.items() if file != BFLOAT16_FILE}
    errors = {tensor: error for written in axmodels.values() for tensor, error in written.weight_error.items()}
    if calibration:
        calibration.require_errors(errors)
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "maker": maker,
        "tools": dict(identity.tools() if tools is None else tools),
        "model": {
            "name": name,
            "model_type": config.model_type,
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "kv_size": config.kv_size,
            "hidden_state_type": target.hidden_state_type,
            "kv_cache_len": target.kv_cache_len,
            "prefill_len": target.prefill_len,
            "groups": [{"tokens": group.tokens, "history": group.history} for group in target.groups],
            "layer_file": target.layer_file(config),
            "post_file": target.post_file(config),
            "embedding_file": BFLOAT16_FILE,
        },
        "text": made.manifest(),
        "flags": asdict(target),
        "inputs": {file: {"sha256": inputs[file].sha256, "size": inputs[file].nbytes} for file in sorted(inputs)},
        "files": {file: files[file] for file in sorted(files)},
        "memory": {
            "axmodels": sum(written.nbytes for written in axmodels.values()),
            "embedding": outputs[BFLOAT16_FILE].nbytes,
            "kv_cache": 2 * config.num_hidden_layers * target.kv_cache_len * config.kv_size * hidden_bytes(target),
        },
    }
    if pooled:
        manifest["pooling"] = pooled.manifest()
    if adapters:  # their files are among the inputs
        manifest["adapters"] = [{"weight": adapter.weight} for adapter in adapters]
    if maker == "cpu":
        # root of squared error over squared weights; deterministic, unlike the figures of a whole-model check
        manifest["accuracy"] = {
            "weight_error": {tensor: float(f"{errors[tensor]:.4g}") for tensor in sorted(errors)},
            "worst_weight_error": float(f"{max(errors.values(), default=0.0):.4g}"),
        }
        stored = {tensor: kept[tensor].packed for tensor in sorted(kept) if not kept[tensor].calibrated}
        if stored:  # their types in the checkpoint
            manifest["accuracy"]["kept"] = stored
        if calibration:
            manifest["calibration"] = calibration.manifest()
    write_json(folder / MANIFEST, manifest)
    return manifest


def add_file(folder: Path, name: str, content: bytes) -> None:
    """Adds or replaces a file of a finished bundle, and updates the manifest. Raises BadInput."""
    manifest = read_manifest(folder)
    manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    manifest["files"] = {file: manifest["files"][file] for file in sorted(manifest["files"])}
    news = {name: folder / f".{name}.new", MANIFEST: folder / f".{MANIFEST}.new"}
    try:
        news[name].write_bytes(content)
        write_json(news[MANIFEST], manifest)
        for file, new in news.items():  # both are completely written before the bundle changes
            new.replace(folder / file)
    except OSError as error:
        raise BadInput(f"cannot write into {folder}: {error.strerror or error}") from None
    finally:
        for new in news.values():
            new.unlink(missing_ok=True)


def hidden_bytes(target: Target) -> int:
    """Bytes per value of the hidden state."""
    return 4 if target.hidden_state_type == "fp32" else 2


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(to_json(values), "utf-8", newline="\n")


def write_texts(
    folder: Path,
    checkpoint: Checkpoint,
    name: str,
    config: ModelConfig,
    target: Target,
    model_config: Path | None = None,
) -> HfFolder:
    """Writes the small files: hf/, verified to load like the checkpoint in transformers, and those for `axllm`.

    Raises BadInput for a tokenizer, template or config that is damaged or loads differently.
    """
    hf = folder / "hf"
    try:
        gguf = checkpoint.path if checkpoint.gguf else None
        made = hf_folder.write(checkpoint.folder, hf, config.vocab_size, model_config, gguf)
        files = axllm.files(hf, made, name, config, target)
    except BadInput as error:
        words = str(error).replace(str(hf), str(checkpoint.path)).replace(str(checkpoint.folder), str(checkpoint.path))
        raise BadInput(words) from None
    (folder / axllm.TOKENIZER_TXT).unlink(missing_ok=True)  # left by a killed build
    for file, text in files.items():
        (folder / file).write_text(text, "utf-8", newline="\n")
    return made

"""Finds the weight files of a checkpoint folder, in the order of transformers' `_get_resolved_checkpoint_files`.

Other formats (adapters, Meta's original files ...) are refused by name, with what to do instead.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axc.checkpoints.gguf.container import MAGIC
from axrun.errors import BadInput

# (whole file, index of shards) in order of preference
ORDER = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
SUFFIXES = (".safetensors", ".bin")
# where the first versions of AutoGPTQ and AutoAWQ describe the quantisation, and the quant_method of each
SETTINGS_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
ADAPTER_CONFIG = "adapter_config.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# torch.distributed checkpoints, which transformers prefers to every other file
DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
# files of a training run with a weight file's suffix that hold no weights
TRAINING = re.compile(r"(training_args|optimizer|scheduler|scaler|random_states|rng_state).*\.bin")
MAX_JSON = 64 << 20  # bytes: an index of 100 000 tensors has 10 MB


@dataclass(frozen=True)
class WeightFiles:
    """`files` hold the weights; `source` is the whole file or the index that names them; `aside` is not read."""

    files: tuple[Path, ...]
    source: str
    aside: tuple[str, ...]


def choose(folder: Path) -> WeightFiles:
    """The weight files that transformers would load. Raises BadInput if there are none or several candidates."""
    if folder.is_file():
        raise BadInput("\n".join(_no_folder(folder)))
    if not folder.is_dir():
        raise BadInput(f"no checkpoint folder {folder}\nGive the folder that holds config.json and the weights.")
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise BadInput(f"cannot read {folder}: {error.strerror}") from None
    _refuse_other_forms(folder, names)
    for single, index in (*ORDER, *sole_weight_file(names)):
        for name in (single, index):
            if name in names and (folder / name).is_symlink() and not (folder / name).exists():
                raise BadInput(f"{folder / name} is a link to nothing\nDownload the checkpoint again.")
        source = single if (folder / single).is_file() else index
        if (folder / source).is_file():
            files = (folder / single,) if source == single else _shards(folder / index)
            for file in files:
                refuse_lfs_pointer(file)
            return WeightFiles(files, source, _aside(names, {source, *(file.name for file in files)}))
    raise BadInput("\n".join(_no_weights(folder, names)))


def sole_weight_file(names: Collection[str]) -> Iterator[tuple[str, str]]:
    """The file and index of an older quantised folder without a file of ORDER: the only ones with their suffixes.

    AutoGPTQ named weight files by bits and group size, like gptq_model-4bit-128g.safetensors.
    """
    if not any(name in names for name in SETTINGS_FILES) or any(name in names for pair in ORDER for name in pair):
        return
    suffix = ".safetensors.index.json"
    found = sorted(name for name in names if name.endswith(suffix))
    found = found or [f"{name}.index.json" for name in sorted(names) if name.endswith(".safetensors")]
    if len(found) == 1:
        yield found[0].removesuffix(".index.json"), found[0]


def _aside(names: Sequence[str], read: set[str]) -> tuple[str, ...]:
    """Weight files and indices in the folder that are not read."""
    indices = {index for _, index in ORDER}
    return tuple(
        name
        for name in names
        if name not in read and (name in indices or (name.endswith(SUFFIXES) and not TRAINING.fullmatch(name)))
    )


def _refuse_other_forms(folder: Path, names: Sequence[str]) -> None:
    """Raises BadInput for files that change what transformers or peft would load."""
    if ADAPTER_CONFIG in names:
        base = _text_of(folder / ADAPTER_CONFIG, "base_model_name_or_path")
        alone = not any(name in names for pair in ORDER for name in pair)
        raise BadInput(
            f"{folder} {'is' if alone else 'holds weights and'} a PEFT adapter ({ADAPTER_CONFIG}) of the base model "
            f"{base}\nGive the base's folder as --input_path and this one as --lora"
            + ("." if alone else f";\nto build the base alone, remove {ADAPTER_CONFIG}.")
        )
    distributed = [name for name in names if DISTRIBUTED.fullmatch(name)]
    if distributed:
        raise BadInput(
            f"{folder} is a torch.distributed checkpoint ({distributed[0]})\n"
            "Load it with transformers and save it again with save_pretrained()."
        )


def _no_folder(file: Path) -> tuple[str, str]:
    """Describes a file in place of a folder, and what to do."""
    try:
        with file.open("rb") as opened:
            gguf = opened.read(len(MAGIC)) == MAGIC
    except OSError as error:
        return f"cannot read {file}: {error.strerror}", "Give the folder that holds config.json and the weights."
    if gguf:
        return (
            f"{file} is a GGUF file whose name does not end in .gguf",
            "Rename it, or give a link that ends in .gguf.",
        )
    return (
        f"{file} is a file, not a checkpoint folder",
        "Give the folder that holds config.json and the weights, or a .gguf file.",
    )


def _no_weights(folder: Path, names: Sequence[str]) -> tuple[str, str]:
    """Describes a folder without weights, and what to do."""
    snapshots = sorted((folder / "snapshots").glob("*/config.json")) if "snapshots" in names else []
    if snapshots:
        return (
            f"{folder} is a folder of the download cache, not a checkpoint",
            f"Give the snapshot: {snapshots[0].parent}" + (" or another beside it." if len(snapshots) > 1 else "."),
        )
    for matches, what, instead in OTHER_FORMS:
        found = [name for name in names if matches(name)]
        if found:
            return f"{folder} holds no weights that can be read, but {what} ({found[0]})", instead
    below = [name for name in names if (folder / name / "config.json").is_file()]
    present = ", ".join(name[:80] for name in names[:8]) or "nothing"
    return (
        f"{folder} holds no weights: expected model.safetensors or pytorch_model.bin, or their .index.json",
        f"Give {folder / below[0]}, which holds a config.json."
        if below
        else f"It holds {present}. docs/checkpoints.md lists what is read.",
    )


def _matches(pattern: str) -> Callable[[str], bool]:
    return lambda name: re.fullmatch(pattern, name) is not None


# other formats: file names, description, advice
OTHER_FORMS: tuple[tuple[Callable[[str], bool], str, str], ...] = (
    (_matches(r".*\.gguf"), "a GGUF file", "Give that file itself as the checkpoint."),
    (
        _matches(r"consolidated.*\.(pth|pt|safetensors)|params\.json"),
        "weights in their authors' own format",
        "Give the version for transformers, with config.json and model.safetensors.",
    ),
    (
        _matches(r"model-\d+-of-\d+\.safetensors"),
        "shards without their index",
        "Download model.safetensors.index.json into the same folder.",
    ),
    (
        _matches(r"pytorch_model-\d+-of-\d+\.bin"),
        "shards without their index",
        "Download pytorch_model.bin.index.json into the same folder.",
    ),
    (
        _matches(r"adapter_model\..*"),
        "the weights of an adapter",
        "Its adapter_config.json is missing; with it, give the folder as --lora beside its base model.",
    ),
    (
        _matches(r"(model|pytorch_model)\..+\.(safetensors|bin)|(model|pytorch_model)\..+\.index\..+\.json"),
        "weights of a variant",
        "transformers loads a variant only by its name. Rename the files to what they are without it.",
    ),
    (
        _matches(r"(quantize_config|quant_config|hf_quant_config)\.json|gptq_model.*|.*awq.*"),
        "quantised weights of an older layout",
        "Give one .safetensors file, and quantization_config in config.json or a file of AutoGPTQ or AutoAWQ\n"
        f"({', '.join(SETTINGS_FILES)}) beside it.",
    ),
    (
        _matches(r"tf_model.*\.h5|flax_model.*\.msgpack|.*\.ckpt\.(index|meta)"),
        "TensorFlow or Flax weights",
        "Load them with transformers 4 (from_tf or from_flax) and save them again with save_pretrained().",
    ),
    (
        _matches(r".*\.(ckpt|pth|pt)"),
        "a checkpoint of a training program",
        "Save the model itself with save_pretrained(), or its state_dict() as pytorch_model.bin.",
    ),
    (_matches(r".*\.onnx"), "an ONNX model", "It is not read. Give the checkpoint it was exported from."),
)


def refuse_lfs_pointer(path: Path) -> None:
    """Raises BadInput for a Git LFS pointer."""
    try:
        with path.open("rb") as file:
            pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None
    if pointer:
        raise BadInput(
            f"{path} is a Git LFS pointer, not the file itself: git has not downloaded it\n"
            "Run `git lfs install && git lfs pull` in that folder, or download the checkpoint again."
        )


def _shards(index: Path) -> tuple[Path, ...]:
    """Every file named by the index. All their tensors are read, whatever the index says, as in transformers."""
    refuse_lfs_pointer(index)
    try:
        if index.stat().st_size > MAX_JSON:
            raise ValueError(f"it has more than {MAX_JSON} bytes")
        named = list(json.loads(index.read_text("utf-8"))["weight_map"].values())
        names = [name for name in dict.fromkeys(named) if isinstance(name, str)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"cannot read the shards' index {index}: {str(error)[:200]}\nDownload it again.") from None
    odd = [
        name
        for name in named
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix not in SUFFIXES
    ]
    if odd or not names:
        seen = f"{odd[0]!r:.80} as a shard" if odd else "no shards"
        raise BadInput(f"{index} names {seen}; expected plain file names beside it\nDownload it again.")
    if len({Path(name).suffix for name in names}) > 1:
        raise BadInput(f"{index} names both .safetensors and .bin files as shards\nDownload the checkpoint again.")
    missing = sorted(name for name in names if not (index.parent / name).is_file())
    if missing:
        raise BadInput(
            f"{len(missing)} of {len(names)} shards named by {index} are missing: {', '.join(missing[:4])}\n"
            "Download them again into that folder."
        )
    return tuple(index.parent / name for name in sorted(names))


def _text_of(path: Path, key: str) -> str:
    """A string from a JSON file for a message, cut to one line."""
    try:
        values: Any = json.loads(path.read_text("utf-8")) if path.stat().st_size <= 1 << 20 else {}
        text = values.get(key) if isinstance(values, dict) else None
    except (OSError, ValueError, RecursionError):
        text = None
    return f"{text[:120]!a}" if isinstance(text, str) and text else "that it does not name"

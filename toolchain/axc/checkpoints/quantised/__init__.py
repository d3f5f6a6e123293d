"""Quantised folders, as config.json or a file beside it declares them: GPTQ, AWQ, AutoRound, compressed-tensors, fp8.

One file per format: it finds the matrices among the stored tensors and presents each as one tensor, `NAME.weight`, with
float32 rows and, if possible, integer levels. All other tensors are unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from axc.checkpoints import folder
from axc.checkpoints.json_files import read_config_json
from axc.checkpoints.quantised import auto_round, awq, compressed_tensors, fp8, gptq, scales
from axc.checkpoints.quantised.matrix import Matrix, Raw
from axc.checkpoints.settings import FLOAT_CHECKPOINT, Settings
from axc.stored import StoredTensor
from axrun.errors import BadInput

# keys of config.json: transformers, older compressed-tensors, MLX
KEYS = ("quantization_config", "compression_config", "quantization")


class Method(NamedTuple):
    """The reader of a quant_method; `tensors`: the names of a matrix's stored tensors besides `weight`."""

    matrices: Callable[[Settings, Raw], Iterator[Matrix]]
    tensors: tuple[str, ...]


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "fp8": Method(fp8.matrices, fp8.TENSORS),
        "gptq": Method(gptq.matrices, gptq.TENSORS),
        "awq": Method(awq.matrices, gptq.TENSORS),
        "auto-round": Method(auto_round.matrices, auto_round.TENSORS),
        "intel/auto-round": Method(auto_round.matrices, auto_round.TENSORS),
        "compressed-tensors": Method(compressed_tensors.matrices, compressed_tensors.TENSORS),
    }
)


# keys of AutoAWQ's quant_config.json, and what they are called in config.json
AWQ_KEYS = {"w_bit": "bits", "q_group_size": "group_size"}


def find(checkpoint: Path, tensors: Mapping[str, StoredTensor]) -> Settings | None:
    """The quantisation settings of a folder with these tensors; None if there are none.

    Raises BadInput for an unsupported quant_method.
    """
    path = checkpoint / "config.json"
    values = read_config_json(path) if path.is_file() else {}
    keys = [key for key in KEYS if values.get(key) is not None]
    if not keys:
        return _beside(checkpoint) if any(name.endswith(".qweight") for name in tensors) else None
    said = values[keys[0]]
    method = said.get("quant_method") if isinstance(said, dict) else None
    if len(keys) > 1 or not isinstance(method, str) or method not in METHODS:
        seen = f"quant_method {method!r:.40}" if method else f"{said!r:.60}"
        raise BadInput(
            f"{path} says the checkpoint is quantised already ({', '.join(keys)}: {seen}); read are "
            f"{', '.join(sorted(METHODS))}\n{FLOAT_CHECKPOINT}"
        )
    return Settings(said, path, keys[0])


def _beside(checkpoint: Path) -> Settings | None:
    """The settings of a folder whose config.json has none: from a file that AutoGPTQ or AutoAWQ wrote beside it."""
    names = [name for name in folder.SETTINGS_FILES if (checkpoint / name).is_file()]
    if not names:
        return None
    if len(names) > 1:
        raise BadInput(f"{checkpoint} is quantised, as {' and '.join(names)} say; which is meant?\nRemove the other.")
    path, usual = checkpoint / names[0], folder.SETTINGS_FILES[names[0]]
    read = read_config_json(path)
    values = {AWQ_KEYS.get(key, key): value for key, value in read.items()} if usual == "awq" else read
    method = values.get("quant_method") or usual
    if len(values) < len(read) or method != usual:
        seen = f"quant_method {method!r:.40}" if method != usual else "one setting under two names"
        raise BadInput(f"{path} has {seen}; expected {usual} settings\n{FLOAT_CHECKPOINT}")
    return Settings({**values, "quant_method": usual}, path, path.name)


# scales of keys and values in the cache, by the last part of their names
CACHE_SCALES = frozenset(("k_scale", "v_scale", "kv_scale", "q_scale", "k_zero_point", "v_zero_point"))


class Presented(NamedTuple):
    """The tensors of a quantised folder, its quantised matrices, and remarks for the user."""

    tensors: dict[str, StoredTensor]
    matrices: tuple[Matrix, ...]
    remarks: tuple[str, ...] = ()


def present(settings: Settings, raw: Raw) -> Presented:
    """What a quantised folder holds. Raises BadInput."""
    method = METHODS[settings.values["quant_method"]]
    tensors, found = dict(raw.tensors), list[Matrix]()
    for matrix in method.matrices(settings, raw):
        module = matrix.stored.name.removesuffix(".weight")
        for suffix in method.tensors:
            tensors.pop(f"{module}.{suffix}", None)
        if tensors.get(matrix.stored.name, matrix.stored).key != matrix.stored.key:
            raise BadInput(f"{matrix.stored.file}: {module} is stored quantised, and as floats too; which is meant?")
        tensors[matrix.stored.name] = matrix.stored
        found.append(matrix)
    if not found:
        raise BadInput(
            f"{settings.path} says that weights are quantised ({settings.where}: {settings.values['quant_method']}), "
            f"but none is stored so\n{FLOAT_CHECKPOINT}"
        )
    cache = [name for name in tensors if name.rpartition(".")[2] in CACHE_SCALES]
    remarks = []
    if cache or settings.values.get("kv_cache_scheme"):
        scales = f" ({len(cache)} scales)" if cache else ""
        remarks.append(f"quantisation of the KV cache{scales}: not read; keys and values keep the hidden state's type")
    left = {name: tensor for name, tensor in tensors.items() if name not in cache}
    return Presented(left, tuple(found), tuple(remarks))


__all__ = ["METHODS", "Matrix", "Presented", "Raw", "Settings", "find", "present", "scales"]

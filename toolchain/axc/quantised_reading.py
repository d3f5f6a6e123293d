"""A second, independent reader of quantised folders: transformers needs a GPU or other packages for most formats.

Written from the packages' documentation with torch, a whole tensor at a time. Values are float32 products of the
stored scales and levels; the packages compute them in the scales' own type, which rounds once more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

Tensor = torch.Tensor
Module = dict[str, Tensor]  # the tensors of a module, by the last part of their names
Says = dict[str, Any]

KEYS = ("quantization_config", "compression_config")
SAID = "its quantised weights are dequantised by axc.quantised_reading, not by transformers"
LAST = """
weight_packed weight_scale weight_scale_inv weight_zero_point weight_shape weight_g_idx qweight qzeros scales g_idx
input_scale input_zero_point output_scale output_zero_point activation_scale
"""


CACHE = {"k_scale", "v_scale", "kv_scale", "q_scale", "k_zero_point", "v_zero_point"}


def take_from(config: Any) -> Says | None:
    """Removes the quantisation settings from a transformers config and returns them."""
    found = None
    for key in KEYS:
        if getattr(config, key, None) is not None:
            found = getattr(config, key)
            delattr(config, key)
    return found if isinstance(found, dict) else None


def older(folder: Path, load: Callable[[Path], Mapping[str, Tensor]]) -> Says | None:
    """The settings beside a config.json without any: AutoGPTQ's quantize_config.json, AutoAWQ's quant_config.json."""
    gptq, awq = folder / "quantize_config.json", folder / "quant_config.json"
    if not gptq.is_file() and not awq.is_file():
        return None
    if not any(name.endswith(".qweight") for file in _files(folder) for name in load(file)):
        return None
    if gptq.is_file():
        return {"quant_method": "gptq", **json.loads(gptq.read_text("utf-8"))}
    read = json.loads(awq.read_text("utf-8"))
    return {"quant_method": "awq", "group_size": read.get("q_group_size"), **read}


def weights(
    folder: Path, says: Says, load: Callable[[Path], Mapping[str, Tensor]], known: Collection[str]
) -> dict[str, Tensor]:
    """Every tensor of a folder by its stored name, quantised ones dequantised to float32.

    Some packages write a bias of zeros for every matrix: those that are not among the `known` weights are left out.
    """
    modules: dict[str, Module] = {}
    plain: dict[str, Tensor] = {}
    last = {*LAST.split()}
    for file in _files(folder):
        for name, tensor in load(file).items():
            module, _, part = name.rpartition(".")
            if part in CACHE:
                continue  # transformers' own cache is not quantised
            if part in last or tensor.dtype in (torch.int8, torch.float8_e4m3fn):
                modules.setdefault(module, {})[part] = tensor
            else:
                plain[name] = tensor
    values = READINGS[str(says["quant_method"])]
    for module in modules:
        name = f"{module}.bias"
        if name in plain and name not in known and not plain[name].any():
            del plain[name]
    return {**plain, **{f"{module}.weight": values(parts, says) for module, parts in modules.items()}}


def _files(folder: Path) -> list[Path]:
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if (folder / whole).is_file():
            return [folder / whole]
        index = folder / f"{whole}.index.json"
        if index.is_file():
            return [folder / name for name in sorted({*json.loads(index.read_text("utf-8"))["weight_map"].values()})]
    return sorted(folder.glob("*.safetensors"))  # AutoGPTQ names its file by bits and group size


def _unpacked(words: Tensor, bits: int, dim: int) -> Tensor:
    """Codes along a dimension, the lowest bits of each word first."""
    shifts = torch.arange(0, 32, bits)
    codes = (words.long().unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.flatten(1) if dim == 1 else codes.permute(0, 2, 1).flatten(0, 1)


def _gptq(module: Module, says: Says) -> Tensor:
    less_one = (says.get("checkpoint_format") or says.get("format") or "gptq") == "gptq"
    return _transposed(module, says["bits"], says["group_size"], less_one)


def _transposed(module: Module, bits: int, group: int, less_one: bool) -> Tensor:
    groups, rows = module["scales"].shape
    bits = {-(-rows * own // 32): own for own in (8, 4)}.get(module["qzeros"].shape[1], bits)  # some have their own
    codes = _unpacked(module["qweight"], bits, 0)  # [in, out]
    if groups != -(-len(codes) // group):
        group = len(codes) // groups
    zeros = module["qzeros"].long()
    if less_one:
        zeros = zeros + sum(1 << bit for bit in range(0, 32, bits))
    zeros = _unpacked(zeros, bits, 1)[:, : codes.shape[1]]
    index = module.get("g_idx", torch.arange(len(codes)) // (group if group > 0 else len(codes))).long()
    return ((codes - zeros[index]).float() * module["scales"].float()[index]).T.contiguous()


def _awq(module: Module, says: Says) -> Tensor:
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def straight(words: Tensor) -> Tensor:
        codes = _unpacked(words, 4, 1).reshape(len(words), -1, 8)
        made = torch.empty_like(codes)
        made[:, :, order] = codes
        return made.flatten(1)

    codes = straight(module["qweight"])  # [in, out]
    size = says["group_size"] if says["group_size"] > 0 else len(codes)
    index = torch.arange(len(codes)) // size
    return ((codes - straight(module["qzeros"])[index]).float() * module["scales"].float()[index]).T.contiguous()


def _auto_round(module: Module, says: Says) -> Tensor:
    kind = str(says.get("packing_format") or says.get("backend"))
    if "awq" in kind:
        return _awq(module, says)
    if kind == "auto_round:fp8":
        return _fp8(module, says)
    return _transposed(
        module, says["bits"], says["group_size"], kind.startswith(("auto_round:auto_gptq", "auto_round:gptq:"))
    )


def _compressed(module: Module, says: Says) -> Tensor:
    forms = [group["weights"] for group in says["config_groups"].values()]
    scales = module["weight_scale"].float()
    if "weight" in module and module["weight"].dtype == torch.float8_e4m3fn:
        return _scaled(
            module["weight"], scales, next(form for form in forms if form["type"] == "float").get("block_structure")
        )
    bits, zeros = 8, module.get("weight_zero_point")
    if "weight_packed" in module:
        rows, columns = (int(size) for size in module["weight_shape"])
        bits = 4 if module["weight_packed"].shape[1] == -(-columns // 8) else 8
        levels = _unpacked(module["weight_packed"], bits, 1)[:, :columns] - (1 << (bits - 1))
        if zeros is not None and zeros.dtype == torch.int32:
            zeros = _unpacked(zeros, bits, 0)[:rows] - (1 << (bits - 1))
    else:
        levels = module["weight"].long()
    columns = levels.shape[1]
    groups = 1 if scales.ndim < 2 else scales.shape[1]
    index = torch.arange(columns) // -(-columns // groups)
    if "weight_g_idx" in module and int(module["weight_g_idx"][0]) >= 0:
        index = module["weight_g_idx"].long()
    zeros = torch.zeros(1, 1) if zeros is None else zeros.reshape(-1, groups)[:, index]
    values: Tensor = (levels - zeros).float()
    return values * scales.reshape(-1, groups)[:, index]


def _fp8(module: Module, says: Says) -> Tensor:
    scales = module.get("weight_scale_inv", module.get("weight_scale"))
    assert scales is not None
    return _scaled(module["weight"], scales.float(), says.get("weight_block_size"))


def _scaled(weight: Tensor, scales: Tensor, block: list[int] | None) -> Tensor:
    values = weight.float()
    if block is None:
        return values.mul(scales.reshape(-1, 1))
    spread = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    spread = spread[: values.shape[0], : values.shape[1]]
    return values.mul(spread)


READINGS: Mapping[str, Callable[[Module, Says], Tensor]] = MappingProxyType(
    {
        "gptq": _gptq,
        "awq": _awq,
        "auto-round": _auto_round,
        "intel/auto-round": _auto_round,
        "compressed-tensors": _compressed,
        "fp8": _fp8,
    }
)

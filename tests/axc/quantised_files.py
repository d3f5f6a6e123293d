"""Small quantised folders of random levels, packed here as the formats are described: all values are known."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from tests.axc.as_transformers import SMALL, random_model

Floats = NDArray[np.float32]
Codes = NDArray[np.int64]
SIZES = {**SMALL, "hidden_size": 128, "intermediate_size": 256, "tie_word_embeddings": False}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Form:
    """A way to store matrices.

    `group`: columns that share a scale, 0 for all; `index`: groups in random columns, alike for matrices of a width
    unless `own`; `one`: one scale for all of the matrix; `down`: how down_proj is stored, where that is another.
    """

    method: str
    bits: int = 4
    group: int = 32
    symmetric: bool = True
    index: bool = False
    own: bool = False
    one: bool = False
    kind: str = ""
    scales: torch.dtype = torch.float16
    down: Form | None = None


FORMS: dict[str, Form] = {
    "gptq-32": Form("gptq"),
    "gptq-128": Form("gptq", group=128),
    "gptq-row": Form("gptq", group=0),
    "gptq-8": Form("gptq", bits=8, group=64),
    "gptq-asymmetric": Form("gptq", group=64, symmetric=False),
    "gptq-v2": Form("gptq", symmetric=False, kind="gptq_v2"),
    "gptq-desc_act": Form("gptq", index=True),
    "gptq-desc_act-asymmetric": Form("gptq", symmetric=False, index=True),
    "gptq-desc_act-own": Form("gptq", index=True, own=True),
    "gptq-8-asymmetric": Form("gptq", bits=8, group=64, symmetric=False, kind="gptq_v2"),
    "gptq-mixed": Form("gptq", down=Form("gptq", bits=8, group=64)),
    "awq": Form("awq", symmetric=False),
    "awq-128": Form("awq", group=128, symmetric=False),
    "auto-round": Form("auto-round", kind="auto_round:auto_gptq"),
    "auto-round-asymmetric": Form("auto-round", symmetric=False, kind="auto_round"),
    "auto-round-awq": Form("auto-round", kind="auto_round:auto_awq"),
    "auto-round-fp8": Form("auto-round", bits=8, group=64, kind="auto_round:fp8", scales=torch.bfloat16),
    "auto-round-mixed": Form(
        "auto-round", kind="auto_round", down=Form("auto-round", group=64, symmetric=False, kind="auto_round")
    ),
    "ct-int4": Form("compressed-tensors", group=128, kind="pack-quantized"),
    "ct-int4-bf16": Form("compressed-tensors", kind="pack-quantized", scales=torch.bfloat16),
    "ct-int4-row": Form("compressed-tensors", group=0, kind="pack-quantized"),
    "ct-int4-asymmetric": Form("compressed-tensors", symmetric=False, kind="pack-quantized"),
    "ct-int4-actorder": Form("compressed-tensors", index=True, kind="pack-quantized"),
    "ct-int8": Form("compressed-tensors", bits=8, group=0, kind="pack-quantized"),
    "ct-int8-plain": Form("compressed-tensors", bits=8, group=0, kind="int-quantized"),
    "ct-int8-plain-asymmetric": Form("compressed-tensors", bits=8, group=0, symmetric=False, kind="int-quantized"),
    "ct-int8-tensor": Form("compressed-tensors", bits=8, group=0, one=True, kind="int-quantized"),
    "ct-int8-tensor-asymmetric": Form(
        "compressed-tensors", bits=8, group=0, symmetric=False, one=True, kind="int-quantized"
    ),
    "ct-mixed": Form(
        "compressed-tensors",
        kind="pack-quantized",
        down=Form("compressed-tensors", bits=8, group=0, symmetric=False, kind="pack-quantized"),
    ),
    "ct-fp8": Form("compressed-tensors", bits=8, group=0, kind="float-quantized"),
    "ct-fp8-blocks": Form("compressed-tensors", bits=8, group=64, kind="float-quantized"),
    "fp8-blocks": Form("fp8", bits=8, group=64, scales=torch.float32),
    "fp8-tensor": Form("fp8", bits=8, group=0, scales=torch.float32),
}
FLOAT_KINDS = ("float-quantized", "auto_round:fp8")
FLOATS = tuple(name for name, form in FORMS.items() if form.method == "fp8" or form.kind in FLOAT_KINDS)


@dataclass(frozen=True)
class Drawn:
    """Random `codes` [out, in] from 0, `scales` and `zeros` [out, groups] or [1, 1], and the group of each column."""

    codes: Codes
    scales: torch.Tensor
    zeros: Codes
    groups: Codes

    @property
    def values(self) -> Floats:
        """The float32 product."""
        scales = self.scales.float().numpy()[:, self.groups]
        return np.asarray((self.codes - self.zeros[:, self.groups]).astype(np.float32) * scales)


def draw(rows: int, columns: int, form: Form, random: np.random.Generator) -> Drawn:
    size = form.group or columns
    groups = np.arange(columns) // size
    if form.index:
        groups = (random if form.own else np.random.default_rng(columns)).permutation(groups)
    shape, top = (1 if form.one else rows, columns // size), 1 << form.bits
    zeros = np.full(shape, top // 2) if form.symmetric else random.integers(0, top, shape)
    spread = 0.15 / top * 4
    scales = torch.from_numpy(random.uniform(spread / 4, spread, shape).astype(np.float32)).to(form.scales)
    return Drawn(random.integers(0, top, (rows, columns)), scales, zeros, groups)


def packed(codes: Codes, bits: int) -> torch.Tensor:
    """Along rows, the lowest bits of a word first."""
    each = 32 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % each))).reshape(len(codes), -1, each)
    words = (padded.astype(np.uint64) << (np.arange(each) * bits).astype(np.uint64)).sum(axis=2)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def gptq(drawn: Drawn, bits: int, less_one: bool) -> dict[str, torch.Tensor]:
    return {
        "qweight": packed(drawn.codes, bits).T.contiguous(),
        "qzeros": packed(drawn.zeros.T - less_one, bits),
        "scales": drawn.scales.T.contiguous(),
        "g_idx": torch.from_numpy(drawn.groups.astype(np.int32)),
    }


def awq(drawn: Drawn) -> dict[str, torch.Tensor]:
    def interleaved(codes: Codes) -> torch.Tensor:
        return packed(codes.reshape(len(codes), -1, 8)[:, :, AWQ_ORDER].reshape(codes.shape), 4)

    weight, zeros = interleaved(drawn.codes.T), interleaved(drawn.zeros.T)
    return {"qweight": weight, "qzeros": zeros, "scales": drawn.scales.T.contiguous()}


def compressed(drawn: Drawn, form: Form) -> dict[str, torch.Tensor]:
    half = 1 << (form.bits - 1)
    made = {"weight_scale": drawn.scales}
    if form.kind == "int-quantized":
        made["weight"] = torch.from_numpy((drawn.codes - half).astype(np.int8))
        zeros = torch.from_numpy((drawn.zeros - half).astype(np.int8))
    else:
        made["weight_packed"] = packed(drawn.codes, form.bits)
        made["weight_shape"] = torch.tensor(drawn.codes.shape)
        zeros = packed(drawn.zeros.T, form.bits).T.contiguous()
    if form.index:
        made["weight_g_idx"] = torch.from_numpy(drawn.groups.astype(np.int32))
    made |= {} if form.symmetric else {"weight_zero_point": zeros}
    for name in ("weight_scale", "weight_zero_point") if form.one else ():
        made |= {name: made[name].flatten()} if name in made else {}
    return made


def floats(rows: int, columns: int, form: Form, random: np.random.Generator) -> tuple[dict[str, torch.Tensor], Floats]:
    """Every finite e4m3 number is likely to be among them."""
    octets = random.integers(0, 256, (rows, columns), np.uint8)
    octets[octets & 127 == 127] = 0
    weight = torch.from_numpy(octets).view(torch.float8_e4m3fn)
    size = form.group
    shape = (-(-rows // size), -(-columns // size)) if size else (rows, 1) if form.method != "fp8" else ()
    scales = torch.from_numpy(np.asarray(random.uniform(1e-4, 3e-4, shape), np.float32)).to(form.scales)
    spread = scales.float()
    if size:
        spread = spread.repeat_interleave(size, 0).repeat_interleave(size, 1)[:rows, :columns]
    name = "weight_scale" if form.method == "compressed-tensors" else "weight_scale_inv"
    return {"weight": weight, name: scales}, (weight.float() * spread).numpy()


def stored(rows: int, columns: int, form: Form, random: np.random.Generator) -> tuple[dict[str, torch.Tensor], Floats]:
    """The tensors of a module, and its values."""
    if form.method == "fp8" or form.kind in FLOAT_KINDS:
        return floats(rows, columns, form, random)
    drawn = draw(rows, columns, form, random)
    if form.method == "compressed-tensors":
        return compressed(drawn, form), drawn.values
    if form.method == "awq" or form.kind == "auto_round:auto_awq":
        return awq(drawn), drawn.values
    return gptq(drawn, form.bits, form.kind in ("", "gptq", "auto_round:auto_gptq")), drawn.values


def config(form: Form) -> dict[str, Any]:
    """quantization_config of config.json."""
    if form.down is None:
        return _config(form)
    says, down = _config(form), _config(form.down)
    own = {key: down[key] for key in ("bits", "group_size", "sym") if key in down}
    if form.method == "gptq":
        return {**says, "dynamic": {r"+:.*\.down_proj": own, "-:lm_head": {}}}
    if form.method == "auto-round":
        return {**says, "extra_config": {r".*down_proj": own, "lm_head": {"bits": 16, "data_type": "fp"}}}
    groups = {**says["config_groups"], "group_1": {**down["config_groups"]["group_0"], "targets": [r"re:.*down_proj"]}}
    return {**says, "config_groups": groups}


def _config(form: Form) -> dict[str, Any]:
    group = form.group or -1
    usual = {"quant_method": form.method, "bits": form.bits, "group_size": group}
    if form.method == "gptq":
        kind = {"checkpoint_format": form.kind} if form.kind else {}
        return {**usual, "sym": form.symmetric, "desc_act": form.index, "damp_percent": 0.1, **kind}
    if form.method == "awq":
        return {**usual, "zero_point": True, "version": "gemm", "modules_to_not_convert": None}
    if form.kind == "auto_round:fp8":
        block = {"group_size": [group, group], "weight_block_size": [group, group], "data_type": "fp"}
        return {**usual, **block, "sym": True, "packing_format": form.kind, "activation_scheme": "dynamic"}
    if form.method == "auto-round":
        return {**usual, "sym": form.symmetric, "packing_format": form.kind, "data_type": "int", "iters": 200}
    if form.method == "fp8":
        block = {"weight_block_size": [form.group, form.group]} if form.group else {}
        return {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", **block}
    weights: dict[str, Any] = {"num_bits": form.bits, "type": "int", "symmetric": form.symmetric, "dynamic": False}
    whole = {"strategy": "tensor" if form.one else "channel"}
    weights |= {"strategy": "group", "group_size": form.group} if form.group else whole
    weights |= {"actorder": "group"} if form.index else {}
    if form.kind == "float-quantized":
        weights |= {"type": "float"}
        if form.group:
            weights |= {"strategy": "block", "block_structure": [form.group, form.group], "group_size": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form.kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
    }


def write(folder: Path, form: Form, seed: int = 0, kind: str = "llama", **changes: Any) -> dict[str, Floats]:
    """A Llama or another kind, all of whose layers' matrices are stored so; their values by name."""
    model = random_model(transformers.AutoConfig.for_model(kind, **{**SIZES, **changes}))
    random, values = np.random.default_rng(seed), dict[str, Floats]()
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.state_dict().items():
        if "layers" not in name or parameter.ndim < 2:
            tensors[name] = parameter.bfloat16()
            continue
        rows, columns = parameter.shape
        own = form.down if form.down and "down_proj" in name else form
        parts, values[name] = stored(rows, columns, own, random)
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    says = {**model.config.to_dict(), "architectures": [type(model).__name__], "quantization_config": config(form)}
    (folder / "config.json").write_text(json.dumps(says))
    return values


def quantised(source: Path, folder: Path, form: Form) -> None:
    """A whole checkpoint, its layers' matrices rounded to the nearest and stored so."""
    shutil.copytree(source, folder)
    random, tensors = np.random.default_rng(0), dict[str, torch.Tensor]()
    for name, tensor in load_file(source / "model.safetensors").items():
        if "layers" not in name or tensor.ndim < 2:
            tensors[name] = tensor
            continue
        values, module = tensor.float().numpy(), name.removesuffix(".weight")
        rows, columns = values.shape
        drawn = draw(rows, columns, form, random)
        ordered = values[:, np.argsort(drawn.groups, kind="stable")].reshape(len(values), -1, form.group)
        low, high = np.minimum(ordered.min(axis=2), 0), np.maximum(ordered.max(axis=2), 0)
        scales = torch.from_numpy((high - low) / 15).to(form.scales)
        zeros = np.clip(np.rint(-low / scales.float().numpy()), 1, 15).astype(np.int64)
        step = scales.float().numpy()[:, drawn.groups]
        codes = np.clip(np.rint(values / step) + zeros[:, drawn.groups], 0, 15).astype(np.int64)
        made = gptq(Drawn(codes, scales, zeros, drawn.groups), form.bits, less_one=True)
        tensors |= {f"{module}.{part}": stored for part, stored in made.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    says = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**says, "quantization_config": config(form)}))

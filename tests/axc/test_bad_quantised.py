"""Quantised folders that lie: shapes, groups, settings and values end in one error that names what is wrong."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from axc import checkpoints, config
from axc.checkpoints import Checkpoint
from axc.checkpoints.quantised import matrix, scales
from axc.reference import Reference
from axrun.errors import BadInput
from tests.axc import quantised_files
from tests.axc.axc import assert_refused, llm_build
from tests.axc.quantised_files import FORMS

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], Any]
Whole = dict[str, tuple[dict[str, Any], Tensors]]
SMALL: dict[str, Any] = {"num_hidden_layers": 1, "vocab_size": 96, "intermediate_size": 128}
USED = (
    "gptq-32",
    "gptq-desc_act",
    "gptq-asymmetric",
    "awq",
    "auto-round",
    "ct-int4",
    "ct-int4-asymmetric",
    "ct-int4-actorder",
    "ct-mixed",
    "fp8-blocks",
)
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are read and checked a few at a time, as those of a large matrix are."""
    monkeypatch.setattr(checkpoints, "BLOCK_ELEMENTS", 8 * 128)
    monkeypatch.setattr(scales, "ROWS", 32)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """config.json and tensors of some forms, of one layer."""
    found, folder = Whole(), tmp_path_factory.mktemp("whole")
    for name in USED:
        quantised_files.write(folder / name, FORMS[name], **SMALL)
        says = json.loads((folder / name / "config.json").read_text())
        found[name] = says, load_file(folder / name / "model.safetensors")
    return found


def write(folder: Path, says: dict[str, Any], tensors: Tensors) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(says))
    return folder


def read_all(folder: Path) -> None:
    """Opens a checkpoint and reads everything that a build could."""
    checkpoint = Checkpoint.open(folder)
    checkpoint.scale_remarks()
    for name, stored in checkpoint.tensors.items():
        if stored.dtype in ("FLOAT", "FLOAT16", "BFLOAT16"):
            for _ in checkpoint.blocks(name):
                pass
        if stored.grid:
            for _ in checkpoint.levels(name, 0, stored.shape[0]):
                pass
            if stored.grid.reordered:
                checkpoint.order(name)


def without(part: str) -> Change:
    return lambda tensors: tensors.pop(f"{UP}.{part}")


def put(part: str, made: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors: tensors.update({f"{UP}.{part}": made(tensors[f"{UP}.{part}"])})


def number(part: str, where: Any, value: float) -> Change:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed[where] = value
        return changed

    return put(part, change)


TENSORS: list[tuple[str, Change, str]] = [
    ("gptq-32", without("scales"), f"{UP}.scales is missing"),
    ("gptq-32", without("qzeros"), f"{UP}.qzeros is missing"),
    ("awq", without("qzeros"), f"{UP}.qzeros is missing"),
    ("ct-int4", without("weight_scale"), f"{UP}.weight_scale is missing"),
    ("ct-int4", without("weight_shape"), f"{UP}.weight_shape is missing"),
    ("ct-int4-asymmetric", without("weight_zero_point"), f"{UP}.weight_zero_point is missing"),
    ("fp8-blocks", without("weight_scale_inv"), f"{UP}.weight_scale_inv is missing"),
    ("gptq-32", put("qweight", lambda t: t.float()), "is stored as FLOAT; expected I32"),
    ("gptq-32", put("scales", lambda t: t.double()), "is stored as DOUBLE; expected FLOAT16"),
    ("gptq-32", put("scales", lambda t: t[:-1]), "has shape [3, 128]; expected [4, 128]"),
    ("gptq-32", put("scales", lambda t: t.flatten()), "has shape [512]; expected [4, 128]"),
    ("gptq-32", put("qzeros", lambda t: t[:, :-1]), "has shape [4, 15]; expected [4, 16]"),
    ("gptq-32", put("qweight", lambda t: t[:0]), "has shape [0, 128]; expected [n, n]"),
    ("gptq-32", put("qweight", lambda t: t[:5]), "expected [2, 128]"),
    ("gptq-desc_act", put("g_idx", lambda t: t[:-1]), "has shape [127]; expected [128]"),
    ("gptq-desc_act", number("g_idx", (5,), 4), "names group 4; there are 4"),
    ("gptq-desc_act", number("g_idx", (5,), -1), "names group -1; there are 4"),
    ("ct-mixed", put("weight_scale", lambda t: t[:, :2]), f"none of the config_groups fit {UP} by bits, groups"),
    ("gptq-desc_act", without("g_idx"), f"{UP}.g_idx is missing"),
    ("ct-int4-actorder", without("weight_g_idx"), f"{UP}.weight_g_idx is missing"),
    ("gptq-32", put("g_idx", lambda t: t.flip(0)), "has groups out of order; config.json says desc_act false"),
    ("awq", put("qzeros", lambda t: t[:, :-1]), "has shape [4, 15]; expected [4, 16]"),
    ("ct-int4", put("weight_shape", lambda t: torch.tensor([1 << 40, 128])), "which [1099511627776, 128] numbers of 4"),
    ("ct-int4", put("weight_shape", lambda t: torch.tensor([128, -8])), "which [128, -8] numbers of 4"),
    ("ct-int4", put("weight_shape", lambda t: torch.tensor([128])), "has shape [1]; expected [2]"),
    ("ct-int4", put("weight_scale", lambda t: t.T[:1]), "has shape [1, 128]; expected [128, 1]"),
    ("ct-int4-asymmetric", put("weight_zero_point", lambda t: t[:-1]), "has shape [15, 4]; expected [16, 4]"),
    (
        "ct-int4-asymmetric",
        put("weight_zero_point", lambda t: torch.full((128, 4), 8, dtype=torch.int8)),
        "holds zero points from 8 to 8; 4 bits hold -8 to 7",
    ),
    ("fp8-blocks", put("weight_scale_inv", lambda t: t[:1]), "has shape [1, 2]; expected [2, 2]"),
    (
        "fp8-blocks",
        lambda tensors: tensors.update({f"{UP}.weight_scale": torch.ones(2, 2)}),
        f"{UP}.weight_scale and {UP}.weight_scale_inv are both stored; which is meant?",
    ),
    ("fp8-blocks", number("weight_scale_inv", (1, 1), np.inf), "group 1 is inf; expected a finite, positive"),
    ("fp8-blocks", number("weight_scale_inv", (1, 0), -1e-3), "at row 64, group 0 is -0.001; expected a finite"),
    ("fp8-blocks", number("weight_scale_inv", (), 0), f"all scales of {UP}.weight are 0, and its levels are not"),
    ("fp8-blocks", number("weight_scale_inv", (1, 1), 1e37), "at row 64, group 1 is 1e+37; expected a finite"),
    ("fp8-blocks", number("weight", (75, 6), np.nan), "holds a value that is not finite at [75, 6]"),
    ("gptq-32", number("scales", (1, 5), np.inf), f"scale of {UP}.weight at row 5, group 1 is inf; expected"),
    ("awq", number("scales", (3, 127), np.nan), "at row 127, group 3 is nan"),
    ("ct-int4", number("weight_scale", (9, 0), -np.inf), "at row 9, group 0 is -inf"),
    ("gptq-desc_act", number("scales", (), 0), f"all scales of {UP}.weight are 0, and its levels are not"),
    ("gptq-32", number("qzeros", (1, 5), 0x77777778), "has a zero point off by 1 (row 40, group 1)"),
    (
        "gptq-32",
        lambda tensors: tensors.update({f"{UP}.weight": torch.ones(128, 128)}),
        "stored quantised, and as floats",
    ),
]


@pytest.mark.parametrize(("form", "change", "words"), TENSORS, ids=[words for *_, words in TENSORS])
def test_tensors_that_do_not_fit(whole: Whole, tmp_path: Path, form: str, change: Change, words: str) -> None:
    says, tensors = whole[form]
    changed = dict(tensors)
    change(changed)
    with pytest.raises(BadInput) as refused:
        read_all(write(tmp_path / "folder", says, changed))
    assert words in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 2


def group(**changes: Any) -> dict[str, Any]:
    """A changed config_groups of compressed-tensors."""
    made = quantised_files.config(FORMS["ct-int4"])["config_groups"]
    made["group_0"]["weights"] |= changes
    return {"config_groups": made}


SETTINGS: list[tuple[str, dict[str, Any], str]] = [
    ("gptq-32", {"bits": 3}, "bits 3; expected 4 or 8"),
    ("gptq-32", {"bits": True}, "bits True"),
    ("gptq-32", {"bits": 8}, "expected [2, 128]"),
    ("gptq-32", {"group_size": 1 << 30}, "group_size 1073741824; expected a whole number"),
    ("gptq-32", {"group_size": 0}, "group_size 0"),
    ("gptq-32", {"group_size": "32"}, "group_size '32'"),
    ("gptq-32", {"group_size": 64}, "expected [2, 128]"),
    ("awq", {"group_size": 40}, "has 128 columns; the group_size 40 does not divide that"),
    ("ct-int4-asymmetric", group(symmetric=False, group_size=40), "the group_size 40 does not divide that"),
    ("ct-int4", group(actorder="activation"), "actorder 'activation'"),
    ("gptq-32", {"desc_act": "yes"}, "desc_act 'yes'; expected True or False"),
    ("gptq-32", {"sym": "yes"}, "sym 'yes'"),
    ("gptq-32", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'; expected 'gptq' or 'gptq_v2'"),
    ("gptq-32", {"dynamic": {"+:.*up.*": {"bits": 3}}}, "quantization_config.dynamic has bits 3; expected 4 or 8"),
    ("gptq-32", {"dynamic": {".*up.*": {"rotation": 8}}}, "dynamic has rotation 8; what that means"),
    (
        "gptq-32",
        {"dynamic": {".*up.*": {"group_size": 40}}},
        "could have 4 bits in groups of 32 or 4 bits in groups of 40",
    ),
    ("gptq-32", {"dynamic": [3]}, "dynamic [3]; expected an object"),
    ("gptq-32", {"rotation": "hadamard"}, "rotation 'hadamard'; what that means"),
    ("gptq-32", {"quant_method": "quip"}, "quant_method 'quip'); read are auto-round"),
    ("gptq-32", {"quant_method": ["gptq"]}, "quant_method ['gptq']); read are"),
    ("gptq-32", {"quant_method": "awq"}, "beside the others of"),
    ("awq", {"version": "gemv"}, "version 'gemv'"),
    ("awq", {"bits": 8}, "bits 8; expected 4"),
    ("auto-round", {"packing_format": "auto_round:mlx"}, "packing_format 'auto_round:mlx'"),
    ("auto-round", {"extra_config": {"model.layers.0": {"bits": 2}}}, "extra_config has bits 2; expected 4 or 8"),
    ("auto-round", {"act_bits": 8}, "act_bits 8"),
    ("ct-int4", {"format": "marlin-24"}, "format 'marlin-24'"),
    ("ct-int4", {"quantization_status": "initialized"}, "quantization_status 'initialized'"),
    ("ct-int4", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config has format 'sparse-24"),
    ("ct-int4", {"config_groups": {}}, "expected ways to store weights"),
    ("ct-int4", {"config_groups": [3]}, "config_groups [3]"),
    ("ct-int4", group(num_bits=3), "num_bits 3"),
    ("ct-int4", group(strategy="tensor_group"), "strategy 'tensor_group'"),
    ("ct-int4", group(group_size=None), "group_size None"),
    ("ct-int4", group(type="float"), "format 'pack-quantized'; expected 'float-quantized'"),
    ("fp8-blocks", {"fmt": "e5m2"}, "fmt 'e5m2'"),
    ("fp8-blocks", {"weight_block_size": [0, 64]}, "weight_block_size [0, 64]"),
    ("fp8-blocks", {"weight_block_size": [64.5, 64]}, "weight_block_size [64.5, 64]"),
    ("fp8-blocks", {"weight_block_size": None}, "expected [128, 1]"),
]


@pytest.mark.parametrize(("form", "changes", "words"), SETTINGS, ids=[words for *_, words in SETTINGS])
def test_settings_that_are_not_read(
    whole: Whole, tmp_path: Path, form: str, changes: dict[str, Any], words: str
) -> None:
    says, tensors = whole[form]
    changed = {**says, "quantization_config": {**says["quantization_config"], **changes}}
    with pytest.raises(BadInput) as refused:
        read_all(write(tmp_path / "folder", changed, tensors))
    assert words in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 2


def test_more_columns_than_any_model_has(whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says, tensors = whole["gptq-32"]
    monkeypatch.setattr(matrix, "MAX_COLUMNS", 127)
    with pytest.raises(BadInput, match=r"qweight has shape \[16, 128\]; expected \[n, n\]"):
        Checkpoint.open(write(tmp_path / "folder", says, tensors))


def test_the_command_ends_with_one_error(whole: Whole, tmp_path: Path) -> None:
    says, tensors = whole["gptq-32"]
    changed = dict(tensors)
    number("scales", (1, 5), np.inf)(changed)
    folder = write(tmp_path / "folder", says, changed)
    assert_refused(llm_build(folder, tmp_path / "out"), f"{UP}.weight", "expected a finite number", "get it again")
    assert not (tmp_path / "out").exists()


def test_a_short_last_group_is_said_to_be_one(tmp_path: Path) -> None:
    quantised_files.write(tmp_path / "folder", FORMS["gptq-32"], **SMALL)
    folder = tmp_path / "folder"
    says, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    says["quantization_config"]["group_size"] = 48  # 128 columns: 48, 48 and 32
    for name in list(tensors):
        if name.endswith((".scales", ".qzeros")):
            tensors[name] = tensors[name][:3]
        elif name.endswith(".g_idx"):
            tensors[name] = torch.arange(128, dtype=torch.int32) // 48
    built = llm_build(write(folder, says, tensors), tmp_path / "out")
    assert_refused(built, "is stored as GPTQ 4-bit in groups of different sizes, which no integer type keeps")


def test_a_pickled_folder(whole: Whole, tmp_path: Path) -> None:
    """The same tensors as pytorch_model.bin."""
    for form in ("gptq-32", "fp8-blocks"):
        says, tensors = whole[form]
        one, other = write(tmp_path / form, says, tensors), tmp_path / f"{form}-bin"
        other.mkdir()
        torch.save(tensors, other / "pytorch_model.bin")
        (other / "config.json").write_text((one / "config.json").read_text())
        mapped, pickled = (Checkpoint.open(folder).rows(f"{UP}.weight", 3, 70) for folder in (one, other))
        assert np.array_equal(mapped, pickled)


@pytest.mark.parametrize("form", ["gptq-32", "awq", "auto-round", "ct-int4", "fp8-blocks"])
def test_keys_that_autoround_adds_are_known(whole: Whole, tmp_path: Path, form: str) -> None:
    """As AutoRound 0.16.1 exports to the formats of others."""
    says, tensors = whole[form]
    added: dict[str, Any] = {"provider": "auto-round"}
    if form != "ct-int4":
        added |= {"autoround_version": "0.16.1", "enable_quanted_input": False, "to_quant_block_names": "model.layers"}
        added |= {"iters": 200, "data_type": "int"} if form != "fp8-blocks" else {}
    says = {**says, "quantization_config": {**says["quantization_config"], **added}}
    read_all(write(tmp_path / "folder", says, tensors))


@pytest.mark.parametrize(
    ("form", "part", "where", "words"),
    [
        ("gptq-32", "scales", (2, 107), f"1 group has the scale 0 ({UP}.weight at row 107, group 2)"),
        ("gptq-32", "scales", (slice(None), 7), f"4 groups have the scale 0 (in 1 matrix, the first is {UP}.weight"),
        ("gptq-desc_act", "scales", (2, 7), f"1 group has the scale 0 ({UP}.weight at row 7, group 2)"),
        ("awq", "scales", (2, 7), f"1 group has the scale 0 ({UP}.weight at row 7, group 2)"),
        ("ct-int4-asymmetric", "weight_scale", (7, 2), f"1 group has the scale 0 ({UP}.weight at row 7, group 2)"),
        ("fp8-blocks", "weight_scale_inv", (0, 1), f"64 groups have the scale 0 (in 1 matrix, the first is {UP}"),
    ],
)
def test_scales_of_0_are_said(whole: Whole, tmp_path: Path, form: str, part: str, where: Any, words: str) -> None:
    says, tensors = whole[form]
    changed, told = dict(tensors), list[str]()
    number(part, where, 0)(changed)
    config.load(Checkpoint.open(write(tmp_path / "folder", says, changed)), say=told.append)
    assert told[0].startswith(words)
    assert told[0].endswith("their weights are 0, whatever their levels are")


def test_scales_that_may_be_so(whole: Whole, tmp_path: Path) -> None:
    """Negative ones, as AutoRound writes them; a 0 where the levels are 0 too."""
    for form, part, zero in (("gptq-32", "scales", 0x88888888 - (1 << 32)), ("fp8-blocks", "weight_scale_inv", 0)):
        says, tensors = whole[form]
        changed, told = dict(tensors), list[str]()
        if form == "gptq-32":
            number(part, (1, 5), -0.01)(changed)
            number(part, (0, 6), 0)(changed)
            number("qweight", (slice(0, 4), 6), zero)(changed)
        else:
            number(part, (1, 1), 0)(changed)
            number("weight", (slice(64, None), slice(64, None)), 0)(changed)
        config.load(Checkpoint.open(write(tmp_path / form, says, changed)), say=told.append)
        assert told == []


VALUES: list[Any] = [None, True, 0, -1, 3, 8, 1 << 62, 2.5, "gptq_v2", "", [], [128, 128], {}, {"bits": 4}]
TYPES = (torch.int8, torch.int32, torch.float16, torch.float64, torch.float8_e4m3fn)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutations(whole: Whole, tmp_path: Path, data: st.DataObject) -> None:
    """Settings, shapes, types and values changed: read, or refused; nothing else is raised."""
    says, tensors = whole[data.draw(st.sampled_from(USED))]
    said, changed = json.loads(json.dumps(says["quantization_config"])), dict(tensors)
    place = said
    while data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(place)))
        if isinstance(place[key], dict) and place[key] and data.draw(st.booleans()):
            place = place[key]
            continue
        place[key] = data.draw(st.sampled_from(VALUES))
    for _ in range(data.draw(st.integers(0, 3))):
        name = data.draw(st.sampled_from(sorted(changed)))
        tensor = changed[name]
        how = data.draw(st.sampled_from(["drop", "cut", "turn", "flat", "type", "noise"]))
        if how == "drop":
            del changed[name]
        elif how == "cut":
            changed[name] = tensor[: data.draw(st.integers(0, 9))] if tensor.ndim else tensor
        elif how == "turn":
            changed[name] = tensor.T if tensor.ndim == 2 else tensor[None]
        elif how == "flat":
            changed[name] = tensor.flatten()
        elif how == "type":
            changed[name] = tensor.float().to(data.draw(st.sampled_from(TYPES)))
        elif tensor.numel():
            noise = np.random.default_rng(data.draw(st.integers(0, 9))).integers(0, 256, tensor.nbytes, np.uint8)
            changed[name] = torch.from_numpy(noise).view(tensor.dtype).reshape(tensor.shape)
    with contextlib.suppress(BadInput):
        read_all(write(tmp_path / "folder", {**says, "quantization_config": said}, changed))


def test_biases_of_zeros_that_the_architecture_does_not_have(whole: Whole, tmp_path: Path) -> None:
    """AutoGPTQ and Optimum write one for every matrix."""
    says, tensors = whole["gptq-32"]
    told: list[str] = []
    zeros = {**tensors, f"{UP}.bias": torch.zeros(128, dtype=torch.float16)}
    folder = write(tmp_path / "folder", says, zeros)
    config.load(Checkpoint.open(folder), say=told.append)
    assert told == ["1 bias of a quantised matrix is all zeros and not of this architecture: left out"]
    assert Reference(folder).weight(f"{UP}.weight").shape == (128, 128)
    zeros[f"{UP}.bias"][3] = 1
    write(folder, says, zeros)
    with pytest.raises(BadInput, match=rf"1 tensor is not of this architecture: {UP}\.bias"):
        config.load(Checkpoint.open(folder))
    with pytest.raises(BadInput, match=rf"does not use {UP}\.bias"):
        Reference(folder)

"""Faults that a check must find: planted in a bundle, in the runner, or between the bundle and its checkpoint."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from axc import build, check
from axc.build import Options, Plan
from axrun import decoder
from axrun.errors import CheckFailed
from axrun.format import axmodel
from axrun.kv_cache import fill_mask

GROUPS: dict[str, Any] = {"prefill_len": 32, "kv_cache_len": 255, "last_kv_cache_len": (32, 128)}
FLOATS: dict[str, Any] = {"hidden_state_type": "fp32", "weight_type": "fp32", "post_weight_type": "fp32"}


@pytest.fixture(scope="module", params=["s8", "fp32"])
def plan(request: pytest.FixtureRequest, tiny_qwen2: Path, bundle_s8: Path, bundle_fp32: Path) -> Plan:
    """A bundle of the shipped model: the default types, and float32."""
    if request.param == "s8":
        return build.plan(Options(tiny_qwen2, bundle_s8, **GROUPS))
    return build.plan(Options(tiny_qwen2, bundle_fp32, **GROUPS, **FLOATS))


def at(plan: Plan, **changes: Any) -> Plan:
    """The plan with another checkpoint path (for the reference) or bundle path."""
    return dataclasses.replace(plan, options=dataclasses.replace(plan.options, **changes))


def found(plan: Plan, level: int = 1) -> str:
    """The result of the check."""
    with pytest.raises(CheckFailed) as failed:
        check.check(plan, level, "1+1=", lambda line: None)
    return str(failed.value)


@pytest.fixture
def bundle(plan: Plan, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(plan.options.output_path, tmp_path / "bundle"))


@pytest.fixture
def checkpoint(tiny_qwen2: Path, tmp_path: Path) -> Callable[..., Path]:
    """The shipped checkpoint with keys of its config.json replaced."""

    def make(**config: Any) -> Path:
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        for file in tiny_qwen2.glob("*.*"):
            shutil.copyfile(file, folder / file.name)
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        return folder

    return make


def edit(path: Path, name: str, change: Callable[[Any], None]) -> None:
    """Changes an initializer of an axmodel in its file."""
    tensor = axmodel.read(path).initializers[name]
    values = tensor.array().copy()
    change(values)
    with path.open("r+b") as file:
        file.seek(tensor.offset)
        file.write(values.tobytes())


def test_an_intact_bundle_passes(plan: Plan) -> None:
    check.check(plan, 2, "1+1=", lambda line: None)


@pytest.mark.parametrize("name", ["rotary.high.cos", "rotary.high.sin"])
def test_rotary_zeroed_from_position_128_on(plan: Plan, bundle: Path, name: str) -> None:
    def zero(values: Any) -> None:
        assert len(values) == 16  # of 16 positions each
        values[8:] = 0

    edit(bundle / "qwen2_p32_l2_together.axmodel", name, zero)
    assert "layer 2 in" in found(at(plan, output_path=bundle))


def test_rotary_zeroed_at_the_last_positions(plan: Plan, bundle: Path) -> None:
    def zero(values: Any) -> None:
        values[-1] = 0

    edit(bundle / "qwen2_p32_l1_together.axmodel", "rotary.high.cos", zero)
    assert "layer 1 in" in found(at(plan, output_path=bundle))


def test_swapped_layers(plan: Plan, bundle: Path) -> None:
    one, other = (bundle / f"qwen2_p32_l{index}_together.axmodel" for index in (1, 2))
    one.rename(bundle / "aside")
    other.rename(one)
    (bundle / "aside").rename(other)
    assert "layer 1 in prefill" in found(at(plan, output_path=bundle))


def test_shifted_embedding_rows(plan: Plan, bundle: Path) -> None:
    table = bundle / "model.embed_tokens.weight.bfloat16.bin"
    table.write_bytes(table.read_bytes()[256:] + table.read_bytes()[:256])
    assert "the embedding table differs" in found(at(plan, output_path=bundle))


def hide_the_last_row(mask: Any, past: int, count: int, visible: Any, blocked: Any) -> None:
    fill_mask(mask, past, count, visible, blocked)
    if past > 192:
        mask[0, :count, past - 1] = blocked


def see_the_next_token(mask: Any, past: int, count: int, visible: Any, blocked: Any) -> None:
    fill_mask(mask, past, count, visible, blocked)
    history = mask.shape[2] - mask.shape[1]
    rows = np.arange(count - 1)
    mask[0, rows, history + rows + 1] = visible


def miss_oneself(mask: Any, past: int, count: int, visible: Any, blocked: Any) -> None:
    fill_mask(mask, past, count, visible, blocked)
    if past:
        mask[0, 0, mask.shape[2] - mask.shape[1]] = blocked


@pytest.mark.parametrize("fault", [hide_the_last_row, see_the_next_token, miss_oneself])
def test_a_mask_off_by_one(plan: Plan, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "fill_mask", fault)
    said = found(plan)
    assert "layer 0 in" in said or "errors rise" in said


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 20000.0},
        {"use_sliding_window": True, "sliding_window": 200, "max_window_layers": 0},
        {"rms_norm_eps": 1e-2},
        {"num_attention_heads": 2},
    ],
    ids=lambda config: next(iter(config)),
)
def test_a_misread_config(plan: Plan, checkpoint: Callable[..., Path], config: dict[str, Any]) -> None:
    """The bundle is built without these keys of config.json, as if our reader ignored them."""
    assert "o not ship it" in found(at(plan, input_path=checkpoint(**config)))


def test_other_weights_preferred_by_transformers(plan: Plan, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"] = weights["model.layers.2.mlp.down_proj.weight"].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "layer 3 in prefill" in found(at(plan, input_path=folder))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.1.self_attn.k_proj.bias", "misses model.layers.1.self_attn.k_proj.bias"),
        ("", "does not use model.layers.1.self_attn.o_proj.bias"),
    ],
)
def test_weights_missing_from_or_unknown_to_transformers(
    plan: Plan, checkpoint: Callable[..., Path], name: str, words: str
) -> None:
    folder = checkpoint()
    weights = load_file(folder / "model.safetensors")
    if name:
        del weights[name]
    else:
        weights["model.layers.1.self_attn.o_proj.bias"] = torch.zeros(128)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert words in found(at(plan, input_path=folder))

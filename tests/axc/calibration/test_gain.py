"""What calibration gains: divergence, bits per weight, recorded errors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from axc.calibration import head, run
from axc.calibration.file import CalibrationFile
from axc.checkpoints import EMBEDDING, HEAD
from axc.quantizer.round_to_nearest import quantize as round_to_nearest
from tests.axc.calibration.calibrations import Floats, dequantised, options


@torch.no_grad()
def divergence(folder: Path, replaced: Mapping[str, Floats]) -> float:
    """Mean KLD of transformers with these weights from itself, over text that no calibration saw."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer.encode((folder / "heldout.txt").read_text()[9000:], add_special_tokens=False)[:512])
    exact = model(ids[None]).logits[0].log_softmax(-1)
    for name, values in replaced.items():
        model.get_parameter(name).copy_(torch.from_numpy(values))
    other = model(ids[None]).logits[0].log_softmax(-1)
    return float((exact.exp() * (exact - other)).sum(-1).mean())


def test_what_calibration_gains(calibrated: Mapping[str, Path], tiny_qwen2: Path) -> None:
    """transformers computes with the weights: 4 bits come nearer than rounded to nearest, 5.5 and 8 nearer yet."""
    exact = {name: dequantised(path) for name, path in calibrated.items()}
    found = {name: divergence(tiny_qwen2, values) for name, values in exact.items()}
    checkpoint = load_file(tiny_qwen2 / "model.safetensors")
    nearest = {}
    for name in exact["4"].keys() - {EMBEDDING, HEAD}:
        raw = checkpoint[name].astype(np.float32)
        levels, scales, *_ = round_to_nearest(raw.reshape(-1, 32), "INT4", "FLOAT16")
        nearest[name] = (levels * np.asarray(scales, np.float32)[:, None]).reshape(raw.shape)
    assert found["4"] < 0.75 * divergence(tiny_qwen2, nearest)
    assert found["8"] < 0.1 * found["5.5"] < 0.1 * 0.75 * found["4"]


def test_bits_are_met(calibrated: Mapping[str, Path]) -> None:
    found = CalibrationFile.open(calibrated["5.5"])
    sizes = {name: values.size for name, values in dequantised(calibrated["5.5"]).items() if "layers" in name}
    average = sum(found.weights[name].bits * size for name, size in sizes.items()) / sum(sizes.values())
    assert 5.3 < average <= 5.5
    assert found.bits == pytest.approx(average, abs=1e-3)
    assert {entry.type for entry in found.weights.values()} == {"s4", "s8"}
    assert CalibrationFile.open(calibrated["4"]).bits == 4.5


def test_recorded_errors(calibrated: Mapping[str, Path], tiny_qwen2: Path) -> None:
    checkpoint, values = load_file(tiny_qwen2 / "model.safetensors"), dequantised(calibrated["4"])
    for name, entry in CalibrationFile.open(calibrated["4"]).weights.items():
        exact = checkpoint[name].astype(np.float64)
        error = np.sqrt(np.square(values[name] - exact).sum() / np.square(exact).sum())
        assert entry.error == pytest.approx(error, rel=2e-3)


@torch.no_grad()
def test_recorded_errors_of_outputs(calibrated: Mapping[str, Path], tiny_qwen2: Path, words: Path) -> None:
    """Of the first layer, whose inputs no quantised layer changes: those that transformers' linears get."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(tiny_qwen2).encode(words.read_text(), add_special_tokens=False)[:1024]
    seen: list[Any] = []
    linear = model.get_submodule("model.layers.0.self_attn.k_proj")
    linear.register_forward_pre_hook(lambda _, given: seen.append(given[0][0]))
    for start in range(0, 1024, 64):
        model(torch.tensor([ids[start : start + 64]]))
    name, x = "model.layers.0.self_attn.k_proj.weight", torch.cat(seen).double()
    exact = linear.weight.double()
    for path in calibrated.values():
        difference = torch.from_numpy(dequantised(path)[name]).double() - exact
        error = float(((x @ difference.T).square().sum() / (x @ exact.T).square().sum()).sqrt())
        entry = CalibrationFile.open(path).weights[name]
        assert entry.output_error == pytest.approx(error, rel=0.03)
        assert abs(entry.error / error - 1) > 0.1


def test_the_head_in_several_parts(
    tiny_qwen2: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows and its errors, as those of a large vocabulary."""
    monkeypatch.setattr(head, "ROWS", 96)
    path = run.calibrate(options(tiny_qwen2, words, tokens=128), tmp_path / "parts.safetensors")
    name, entry = next((n, e) for n, e in CalibrationFile.open(path).weights.items() if n in (EMBEDDING, HEAD))
    exact = load_file(tiny_qwen2 / "model.safetensors")[name].astype(np.float64)
    error = np.sqrt(np.square(dequantised(path)[name] - exact).sum() / np.square(exact).sum())
    assert entry.error == pytest.approx(error, rel=2e-3)
    assert entry.error < 0.02
    assert entry.output_error < 0.02


def test_outputs_of_the_head_are_nearer_than_rounded_to_nearest(
    calibrated: Mapping[str, Path], tiny_qwen2: Path
) -> None:
    """By what transformers makes of float hidden states."""
    values = dequantised(calibrated["8"])
    name = next(name for name in values if name in (EMBEDDING, HEAD))
    raw = load_file(tiny_qwen2 / "model.safetensors")[name].astype(np.float32)
    levels, scales, *_ = round_to_nearest(raw, "INT8")
    assert head_divergence(tiny_qwen2, values[name]) < 0.6 * head_divergence(tiny_qwen2, levels * scales[:, None])


@torch.no_grad()
def head_divergence(folder: Path, weights: Floats) -> float:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder).encode((folder / "heldout.txt").read_text()[9000:])[:512])
    hidden = model.model(ids[None]).last_hidden_state[0]
    exact, other = ((hidden @ w.T).log_softmax(-1) for w in (model.lm_head.weight, torch.from_numpy(weights)))
    return float((exact.exp() * (exact - other)).sum(-1).mean())

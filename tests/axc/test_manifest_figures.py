"""The figures of a bundle's manifest, computed again from its files by onnx and from the checkpoint by safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file

from tests.conftest import Builder


@pytest.mark.parametrize("weight_type", ["s8", "s4"])
def test_errors_of_weights(build_tiny: Builder, tiny_qwen2: Path, weight_type: str) -> None:
    bundle = build_tiny(weight_type=weight_type)
    figures = json.loads((bundle / "manifest.json").read_text())["accuracy"]
    checkpoint, errors = load_file(tiny_qwen2 / "model.safetensors"), {}
    for file in bundle.glob("*.axmodel"):
        stored = {tensor.name: tensor for tensor in onnx.load(file).graph.initializer}
        for name in stored.keys() & figures["weight_error"].keys():
            exact = checkpoint[name].astype(np.float64)
            scales = numpy_helper.to_array(stored[f"{name}_scale"]).astype(np.float64).reshape(len(exact), -1)
            levels = numpy_helper.to_array(stored[name]).astype(np.float64)
            values = levels.reshape(*scales.shape, -1) * scales[..., None]
            difference = values.reshape(exact.shape) - exact
            errors[name] = np.sqrt(np.square(difference).sum() / np.square(exact).sum())
    assert figures["weight_error"] == pytest.approx(errors, rel=1e-3)
    assert len(errors) == 4 * 7 + 1
    assert figures["worst_weight_error"] == max(figures["weight_error"].values())


def test_memory(bundle_s8: Path) -> None:
    manifest = json.loads((bundle_s8 / "manifest.json").read_text())
    config = json.loads((bundle_s8 / "hf" / "config.json").read_text())
    head = config["hidden_size"] // config["num_attention_heads"]
    rows = config["num_hidden_layers"] * 255 * config["num_key_value_heads"] * head
    assert manifest["memory"] == {
        "axmodels": sum(file.stat().st_size for file in bundle_s8.glob("*.axmodel")),
        "embedding": (bundle_s8 / "model.embed_tokens.weight.bfloat16.bin").stat().st_size,
        "kv_cache": 2 * rows * 2,  # keys and values, in bfloat16
    }

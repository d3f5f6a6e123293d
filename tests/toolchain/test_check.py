"""The check itself: it passes what is right and finds what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from board import axmodel
from board.bundle import sha256
from toolchain.cli import main


def arguments(checkpoint: Path, output: Path, report: Path) -> list[str]:
    command = [
        "llm_build",
        "--input_path",
        str(checkpoint),
        "--output_path",
        str(output),
        "--check_report",
        str(report),
    ]
    return [*command, "--prefill_len", "32", "--kv_cache_len", "255", "--last_kv_cache_len", "32", "-c", "2"]


def test_level_2_answers(tiny_qwen2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    assert main(arguments(tiny_qwen2, tmp_path / "out", report)) == 0
    shown = capsys.readouterr().out
    seen = json.loads(report.read_text())
    assert [shown.index(f"{step} done") for step in ("prepare", "build", "check")] == sorted(
        shown.index(f"{step} done") for step in ("prepare", "build", "check")
    )
    assert seen["model"]["answer"] == seen["model"]["reference"] == "2"
    assert {(entry["part"], entry["stage"]) for entry in seen["layers"]} == {
        *((f"layer {index}", stage) for index in range(4) for stage in ("prefill", "decode")),
        ("post", "logits"),
    }
    assert all(entry["cosine"] > 0.999 for entry in seen["layers"])
    assert seen["model"]["top1_agreement"] >= 0.99
    assert seen["failures"] == []


@pytest.mark.parametrize("planted", ["a flipped scale", "a lost norm"])
def test_a_planted_fault_is_found(
    planted: str, tiny_qwen2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Made in the files and covered up in the manifest: only a comparison with the checkpoint can see it."""
    output, report = tmp_path / "out", tmp_path / "report.json"
    assert main([*arguments(tiny_qwen2, output, report)[:-1], "-1"]) == 0
    layer = output / "qwen2_p32_l1_together.axmodel"
    name = "mlp.down_proj.weight_scale" if planted == "a flipped scale" else "post_attention_layernorm.weight"
    tensor = axmodel.read(layer).initializers[f"model.layers.1.{name}"]
    values = tensor.array().copy()
    if planted == "a flipped scale":
        values[:16] *= -1
    else:
        values[:16] = 0
    with layer.open("r+b") as file:
        file.seek(tensor.offset)
        file.write(values.astype(np.float32).tobytes())
    manifest = json.loads((output / "manifest.json").read_text())
    manifest["files"][layer.name]["sha256"] = sha256(layer)
    (output / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    assert main(arguments(tiny_qwen2, output, report)) == 1
    error = capsys.readouterr().err
    assert "does not agree with its checkpoint: layer 1 in" in error
    assert len(error.strip().splitlines()) <= 3

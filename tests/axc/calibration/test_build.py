"""Builds with calibrated weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors import safe_open
from safetensors.numpy import load_file

from axc import build, console, logits
from axc.calibration.file import KEY, CalibrationFile, entries, save
from axc.calibration.options import Options
from axc.checkpoints import EMBEDDING, HEAD
from axc.doctor import stored, weight_faults
from axrun.errors import BadInput
from axrun.format import axmodel
from axrun.format.bundle import verify
from tests.axc.calibration.calibrations import Floats, options


def test_a_build_writes_these_levels(calibrated: Mapping[str, Path], tiny_qwen2: Path, tmp_path: Path) -> None:
    """Read back by onnx, bit for bit; the same bytes in two processes."""
    path = calibrated["5.5"]
    manifests = []
    for parallel in (1, 2):
        asked = build.Options(tiny_qwen2, tmp_path / str(parallel), calibrated=path, parallel=parallel, kv_cache_len=63)
        manifests.append(build.build(build.plan(asked)).manifest)
    assert manifests[0]["files"] == manifests[1]["files"]
    assert manifests[0]["calibration"]["sha256"] == CalibrationFile.open(path).sha256
    expected, tensors = load_file(path), dict[str, Any]()
    for file in (tmp_path / "1").glob("*.axmodel"):
        tensors |= {tensor.name: tensor for tensor in onnx.load(file).graph.initializer}
    for name, entry in manifests[0]["calibration"]["weights"].items():
        raw = np.frombuffer(tensors[name].raw_data, expected[name].dtype)
        assert np.array_equal(raw, expected[name].reshape(-1))
        assert tensors[name].data_type == (onnx.TensorProto.INT4 if entry["type"] == "s4" else onnx.TensorProto.INT8)
        assert np.array_equal(numpy_helper.to_array(tensors[f"{name}_scale"]), expected[f"{name}_scale"])
    again = build.build(build.plan(build.Options(tiny_qwen2, tmp_path / "1", calibrated=path, kv_cache_len=63)))
    assert not again.fresh


def test_levels_of_another_matrix_are_found_while_building(
    calibrated: Mapping[str, Path], tiny_qwen2: Path, tmp_path: Path
) -> None:
    """The file's own digest is right: only the checkpoint tells that two matrices of one shape were exchanged."""
    path, tensors = tmp_path / "exchanged.safetensors", load_file(calibrated["4"])
    gate, up = (f"model.layers.2.mlp.{name}_proj.weight" for name in ("gate", "up"))
    for end in ("", "_scale"):
        tensors[gate + end], tensors[up + end] = tensors[up + end], tensors[gate + end]
    with safe_open(calibrated["4"], "np") as file:
        save(path, tensors, json.loads(file.metadata()[KEY]))
    asked = build.Options(tiny_qwen2, tmp_path / "out", calibrated=path, kv_cache_len=63)
    with pytest.raises(BadInput, match=r"mlp\.(gate|up)_proj\.weight differs from the checkpoint by 1\.\d+; its"):
        build.build(build.plan(asked))
    assert not (tmp_path / "out").exists()


def widened(tensor: Floats, start: int, stop: int) -> Floats:
    return tensor[start:stop].astype(np.float32)


def test_the_doctor_knows_calibrated_levels(calibrated: Mapping[str, Path], tiny_qwen2: Path, tmp_path: Path) -> None:
    """They are not the nearest ones, and still not any: one that changed is found by the error that was recorded."""
    asked = build.Options(tiny_qwen2, tmp_path / "bundle", calibrated=calibrated["4"], kv_cache_len=63)
    manifest = build.build(build.plan(asked)).manifest
    checkpoint, name = load_file(tiny_qwen2 / "model.safetensors"), "model.layers.1.mlp.down_proj.weight"
    entry = entries(manifest)[name]

    def fault() -> weight_faults.Fault | None:
        kept = stored.read(axmodel.read(tmp_path / "bundle" / (manifest["model"]["layer_file"] % 1)))[name]
        return weight_faults.unlike_calibrated(kept, name, lambda *at: widened(checkpoint[at[0]], *at[1:]), entry.error)

    assert fault() is None
    path = tmp_path / "bundle" / (manifest["model"]["layer_file"] % 1)
    levels, content = load_file(calibrated["4"])[name].tobytes(), path.read_bytes()
    assert content.count(levels) == 1
    path.write_bytes(content.replace(levels, bytes(byte ^ 0x33 for byte in levels[:200]) + levels[200:]))
    found = fault()
    assert found is not None
    assert "differ from those of the calibration" in found.cause


def test_reference_logits_are_added_to_a_calibrated_bundle(
    calibrated: Mapping[str, Path], words: Path, tiny_qwen2: Path, tmp_path: Path
) -> None:
    """Its manifest lists the calibration file beside the files of the checkpoint."""
    output = tmp_path / "bundle"
    build.build(build.plan(build.Options(tiny_qwen2, output, calibrated=calibrated["4"], kv_cache_len=63)))
    asked = logits.Options(tiny_qwen2, words, bundle=output, window=32, tokens=64, greedy_tokens=2)
    said: list[str] = []
    path, written = logits.write(asked, say=said.append)
    assert path.parent == output
    assert "calibration" not in written.about["inputs"]
    assert any(line.startswith("figures.npz for axrun doctor: ") for line in said)
    verify(output)


def test_the_head_of_another_type_is_not_taken(
    calibrated: Mapping[str, Path], tiny_qwen2: Path, tmp_path: Path
) -> None:
    path = calibrated["4"]

    def stored_head(**more: Any) -> Any:
        kept = build.plan(build.Options(tiny_qwen2, tmp_path / "out", calibrated=path, kv_cache_len=63, **more)).kept
        return kept.get(EMBEDDING) or kept.get(HEAD)

    assert stored_head().bits == stored_head(post_weight_type="s8").bits == 8.25
    assert stored_head(post_weight_type="bf16") is None


def test_a_build_is_planned_before_it_calibrates(
    tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_calibrated", lambda _: pytest.fail("calibrated first"))
    asked = build.Options(tiny_qwen2, tmp_path / "out", weight_type="s4", kv_cache_len=1 << 19)
    with pytest.raises(BadInput, match="--kv_cache_len"):
        console.llm_build(asked, 0, "", None, Options(tiny_qwen2))


def test_another_bundle_is_refused_before_the_calibration(
    calibrated: Mapping[str, Path],
    words: Path,
    tiny_qwen2: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(console, "_calibrated", lambda _: pytest.fail("calibrated first"))
    nearest, output = tmp_path / "s8", tmp_path / "4"
    build.build(build.plan(build.Options(tiny_qwen2, nearest, kv_cache_len=63)))
    build.build(build.plan(build.Options(tiny_qwen2, output, calibrated=calibrated["4"], kv_cache_len=63)))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("precious")
    for path, kind, more, said in (
        (nearest, "s4", {}, "it has --weight_type s8, this build s4"),
        (nearest, "s8", {"weight_type": "s8"}, "it was not calibrated, this build is"),
        (output, None, {"bits": 5.5}, "it was calibrated with --bits none, this build with 5.5"),
        (output, "s4", {"calibration": ()}, "it was calibrated on another text"),
        (tmp_path / "folder", "s4", {}, "something that is no bundle"),
    ):
        asked = build.Options(tiny_qwen2, path, weight_type=kind, kv_cache_len=63)
        with pytest.raises(BadInput, match=rf"{said}.*\n.*--output_path \(make: OUT=folder\)"):
            console.llm_build(asked, 0, "", None, options(tiny_qwen2, words, **more))
    monkeypatch.setattr(console, "_calibrated", lambda _: calibrated["4"])
    asked = build.Options(tiny_qwen2, output, weight_type="s4", kv_cache_len=63)
    console.llm_build(asked, -1, "", None, options(tiny_qwen2, words))
    assert "nothing to build" in capsys.readouterr().out


def test_another_calibration_is_named(calibrated: Mapping[str, Path], tiny_qwen2: Path, tmp_path: Path) -> None:
    def built(name: str | None, **more: Any) -> build.Built:
        path = calibrated[name] if name else None
        return build.build(build.plan(build.Options(tiny_qwen2, tmp_path / "out", calibrated=path, **more)))

    built("4")
    with pytest.raises(BadInput, match=r"another bundle: it was calibrated with --bits none, this build with 5\.5"):
        built("5.5")
    with pytest.raises(BadInput, match="another bundle: it was calibrated, this build is not"):
        built(None, weight_type="s4", post_weight_type="s8")


@pytest.mark.parametrize(("kind", "bits", "said"), [(None, None, True), ("s4", None, False), (None, 5.0, False)])
def test_a_build_without_w_says_that_it_calibrates_s4(
    kind: str | None,
    bits: float | None,
    said: bool,
    tiny_qwen2: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(_: Options) -> Path:
        raise BadInput("enough")

    monkeypatch.setattr(console, "_calibrated", refused)
    asked = build.Options(tiny_qwen2, tmp_path / "out", weight_type=kind)
    with pytest.raises(BadInput, match="enough"):
        console.llm_build(asked, 0, "", None, Options(tiny_qwen2, bits=bits))
    assert ("note: without -w, calibrated weights are s4; for 8 bits, set -w s8" in capsys.readouterr().out) == said

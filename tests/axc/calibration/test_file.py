"""The calibration file: damaged ones, and those of another checkpoint, are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from axc import build, console
from axc.calibration import cache
from axc.calibration.file import KEY, CalibrationFile
from axc.calibration.options import Options
from axrun.errors import BadInput
from tests.axc.calibration.calibrations import options


def test_a_file_of_another_checkpoint_is_refused(
    calibrated: Mapping[str, Path], tiny_qwen2: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_qwen2 / name).read_bytes())
    tensors = load_file(tiny_qwen2 / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"] * 2
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match="made from another checkpoint"):
        build.plan(build.Options(tmp_path, tmp_path / "out", calibrated=calibrated["4"]))
    with pytest.raises(BadInput, match="--calibrated_sha256 is 'abc'"):
        build.plan(build.Options(tiny_qwen2, tmp_path / "out", calibrated=calibrated["4"], calibrated_sha256="abc"))
    with pytest.raises(BadInput, match="--weight_type is s8"):
        build.plan(build.Options(tiny_qwen2, tmp_path / "out", calibrated=calibrated["4"], weight_type="s8"))


SCALE = "model.layers.0.mlp.up_proj.weight_scale"


def _spoiled(tensors: dict[str, Any], header: dict[str, Any], how: str) -> None:
    entry = header["weights"][SCALE.removesuffix("_scale")]
    if how == "no scales":
        del tensors[SCALE]
    elif how == "a scale of 0":
        tensors[SCALE][3, 1] = 0
    elif how == "other shape":
        tensors[SCALE] = tensors[SCALE][:-1]
    elif how == "float32 scales":
        tensors[SCALE] = tensors[SCALE].astype(np.float32)
    elif how == "another type":
        entry["type"] = "s8"
    elif how == "odd block":
        entry["block"] = 0
    elif how == "one level":
        tensors[SCALE.removesuffix("_scale")][5, 7] ^= 1
    else:
        del header["weights"]


DAMAGES = [
    *("no scales", "a scale of 0", "other shape", "float32 scales"),
    *("another type", "odd block", "one level", "no weights"),
]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file_is_refused(how: str, calibrated: Mapping[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "damaged.safetensors"
    tensors = load_file(calibrated["4"])
    with safe_open(calibrated["4"], "np") as file:
        header = json.loads(file.metadata()[KEY])
    _spoiled(tensors, header, how)
    save_file(tensors, path, {KEY: json.dumps(header)})
    with pytest.raises(BadInput, match=r"damaged\.safetensors"):
        CalibrationFile.open(path)


@pytest.mark.parametrize("size", [0, 7, 1000, -1])
def test_a_truncated_file_is_refused(size: int, calibrated: Mapping[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "truncated.safetensors"
    path.write_bytes(calibrated["4"].read_bytes()[:size])
    with pytest.raises(BadInput, match="is no calibration file"):
        CalibrationFile.open(path)


def test_the_cache_tells_calibrations_apart(
    tiny_qwen2: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By all that decides them; not by where checkpoint and text lie."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copy, scaled, text = tmp_path / "copy", tmp_path / "scaled", tmp_path / "other name.txt"
    for folder in (copy, scaled):
        shutil.copytree(tiny_qwen2, folder)
    tensors = load_file(scaled / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, scaled / "model.safetensors", {"format": "pt"})
    text.write_bytes(words.read_bytes())
    usual = cache.place(options(tiny_qwen2, words))
    assert usual.parent == tmp_path / "cache" / "axc" / "calibrations"
    assert cache.place(options(copy, text)) == usual
    changes: list[dict[str, Any]] = [{"tokens": 960}, {"window": 32}, {"bits": 5.0}, {"weight_type": "s8"}]
    changes += [{"calibration": (words, words)}, {"calibration": ()}]
    others = [cache.place(options(tiny_qwen2, words, **more)) for more in changes]
    assert len({usual, cache.place(options(scaled, words)), *others}) == 2 + len(changes)


def test_a_damaged_file_in_the_cache_is_made_again(
    calibrated: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cached.safetensors"
    path.write_bytes(calibrated["4"].read_bytes()[:3000])
    monkeypatch.setattr(cache, "place", lambda _: path)
    monkeypatch.setattr(console, "calibrate", lambda _, to: to.write_bytes(calibrated["4"].read_bytes()))
    assert console._calibrated(Options(tmp_path)) == path
    assert path.read_bytes() == calibrated["4"].read_bytes()
    assert "is no calibration file" in (said := capsys.readouterr().out)
    assert said.endswith("; calibrating again\n")
    assert console._calibrated(Options(tmp_path)) == path
    assert capsys.readouterr().out == f"note: calibration taken from the cache: {path}\n"

"""Calibrations that are killed, damaged, or run twice at a time."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from axc import console
from axc.calibration import run
from axrun.errors import BadInput
from tests.axc.calibration.calibrations import options


class Killed(Exception):
    """Stands for the end of the process."""


def test_a_killed_calibration_goes_on(
    calibrated: Mapping[str, Path], tiny_qwen2: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "again.safetensors"

    def kill(done: int, total: int, what: str) -> None:
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        run.calibrate(options(tiny_qwen2, words), output, kill)
    assert not output.exists()
    quantised, real = [], run._quantise
    monkeypatch.setattr(run, "_quantise", lambda *given: quantised.append(given[2]) or real(*given))  # type: ignore[func-returns-value]
    run.calibrate(options(tiny_qwen2, words), output)
    assert quantised == ["model.layers.2.", "model.layers.3."]
    assert output.read_bytes() == calibrated["4"].read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.safetensors"]


@pytest.mark.parametrize("changed", ["nothing", "text", "checkpoint"])
def test_layers_of_another_calibration_are_not_continued(
    tiny_qwen2: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    folder, text, quantised = tmp_path / "checkpoint", tmp_path / "words.txt", list[str]()
    shutil.copytree(tiny_qwen2, folder)
    text.write_text(words.read_text())
    real = run._quantise
    monkeypatch.setattr(run, "_quantise", lambda *given: quantised.append(given[2]) or real(*given))  # type: ignore[func-returns-value]

    def calibrate(last: int) -> None:
        def kill(done: int, total: int, what: str) -> None:
            if done == last:
                raise Killed

        with pytest.raises(Killed):
            run.calibrate(options(folder, text, tokens=64), tmp_path / "out.safetensors", kill)

    calibrate(1)
    if changed == "text":
        text.write_text(words.read_text()[1:])
    if changed == "checkpoint":
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.3.mlp.up_proj.weight"] = tensors["model.layers.3.mlp.up_proj.weight"] * 2
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    calibrate(2)
    first, second = "model.layers.0.", "model.layers.1."
    assert quantised == ([first, second] if changed == "nothing" else [first, first, second])


def test_progress_is_printed_where_there_is_no_terminal(
    tiny_qwen2: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And an interrupted calibration says that it continues, once it has a finished layer."""
    output, save = tmp_path / "out.safetensors", run._save

    def interrupted(path: Path, result: Any) -> None:
        if path.name == last:
            raise KeyboardInterrupt
        save(path, result)

    monkeypatch.setattr(run, "_save", interrupted)
    for last, said in (  # noqa: B007  (read by `interrupted`)
        ("0.safetensors", "^$"),
        ("1.safetensors", "^finished layers are kept: run the same command again$"),
    ):
        with pytest.raises(KeyboardInterrupt, match=said):
            console.calibrate(options(tiny_qwen2, words, tokens=64), output)
    assert "about 1 to 10 s on 2 cores" in capsys.readouterr().out
    monkeypatch.setattr(run, "_save", save)
    console.calibrate(options(tiny_qwen2, words, tokens=64), output)
    steps = ["layer 1 of 4, kept", *(f"layer {at} of 4" for at in range(2, 5)), "head", "writing"]
    assert capsys.readouterr().err.splitlines() == [f"calibrate {step}" for step in steps]


def test_two_processes_do_not_write_one_file(tiny_qwen2: Path, words: Path, tmp_path: Path) -> None:
    output = tmp_path / "one.safetensors"

    def second(done: int, total: int, what: str) -> None:
        with pytest.raises(BadInput, match=r"another process is writing .*one\.safetensors"):
            run.calibrate(options(tiny_qwen2, words, tokens=64), output)
        raise Killed

    with pytest.raises(Killed):
        run.calibrate(options(tiny_qwen2, words, tokens=64), output, second)
    with pytest.raises(BadInput, match="is a folder"):
        run.calibrate(options(tiny_qwen2, words, tokens=64), tmp_path)


@pytest.mark.parametrize("kept", [0, 9000])
def test_a_damaged_layer_is_calibrated_again(
    calibrated: Mapping[str, Path], tiny_qwen2: Path, words: Path, tmp_path: Path, kept: int
) -> None:
    """What a power cut leaves: a file without its content, or with zeros behind its beginning."""
    output = tmp_path / "again.safetensors"

    def cut(done: int, total: int, what: str) -> None:
        if done == 3:
            path = tmp_path / "again.safetensors.layers" / "1.safetensors"
            content = path.read_bytes()
            path.write_bytes(content[:kept] + bytes(4096) + content[kept + 4096 :] if kept else b"")
            assert path.read_bytes() != content
            raise Killed

    with pytest.raises(Killed):
        run.calibrate(options(tiny_qwen2, words), output, cut)
    run.calibrate(options(tiny_qwen2, words), output)
    assert output.read_bytes() == calibrated["4"].read_bytes()

"""The command `axc doctor`: its output and exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from axc import cli
from axc.doctor import on_board
from axrun import decoder
from axrun.doctor.report import STAGES, Report
from axrun.errors import BadInput
from axrun.format import axmodel
from axrun.format.bundle import MANIFEST, sha256
from axrun.kv_cache import fill_mask


def ended(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    code = cli.main(["doctor", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


def signed(bundle: Path, name: str) -> None:
    """The manifest agrees with a file that was changed."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["files"][name] = {"sha256": sha256(bundle / name), "size": (bundle / name).stat().st_size}
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def test_a_healthy_bundle(bundle_s8: Path, tiny_qwen2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = ended(capsys, bundle_s8, "--checkpoint", tiny_qwen2, "--json")
    report = json.loads(out)
    assert (code, report["verdict"], report["finding"]) == (0, "healthy", None)
    assert [(stage["stage"], stage["outcome"]) for stage in report["stages"]] == [(name, "agrees") for name in STAGES]
    assert report["engine"] in ("ax", "ort")
    assert "[10/10] answer" in err


def test_one_wrong_scale_without_effect_on_answers(
    bundle_s8: Path, tiny_qwen2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = shutil.copytree(bundle_s8, tmp_path / "bundle")
    name, tensor = "qwen2_p32_l2_together.axmodel", "model.layers.2.mlp.up_proj.weight_scale"
    stored = axmodel.read(bundle / name).initializers[tensor]
    scales = stored.array().copy()
    scales[17] *= 1.05
    with (bundle / name).open("r+b") as file:
        file.seek(stored.offset)
        file.write(scales.tobytes())
    signed(bundle, name)
    code, out, err = ended(capsys, bundle, "--checkpoint", tiny_qwen2)
    assert code == 1
    assert f"layers: layer 2, model.layers.2.mlp.up_proj.weight ({name})" in out
    assert "row 17: one scale is 1.05 times the right value" in out
    assert err.splitlines()[-1].startswith(f"error: {bundle}")
    assert "post " not in out, "it stops at the first that disagrees"


def test_a_runner_that_hides_a_row(
    bundle_s8: Path, tiny_qwen2: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def hidden(mask: Any, past: int, count: int, visible: Any, blocked: Any) -> None:
        fill_mask(mask, past, count, visible, blocked)
        if past > 192:
            mask[0, :count, past - 1] = blocked

    monkeypatch.setattr(decoder, "fill_mask", hidden)
    code, out, _ = ended(capsys, bundle_s8, "--checkpoint", tiny_qwen2, "--json")
    finding = json.loads(out)["finding"]
    assert (code, finding["stage"], finding["file"]) == (1, "cache", "board/axrun/decoder.py")
    assert "its mask hides cached row" in finding["cause"]


def test_the_checkpoint_of_another_model(bundle_s8: Path, uneven: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = ended(capsys, bundle_s8, "--checkpoint", uneven)
    assert (code, out) == (2, "")
    assert "is the checkpoint of another model: its model_type is llama" in err


@pytest.mark.parametrize("missing", ["bundle", "checkpoint"])
def test_missing_paths(
    missing: str, bundle_s8: Path, tiny_qwen2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = {"bundle": bundle_s8, "checkpoint": tiny_qwen2, missing: tmp_path / "none"}
    code, out, err = ended(capsys, folders["bundle"], "--checkpoint", folders["checkpoint"])
    assert (code, out) == (2, "")
    assert f"no {missing} folder {tmp_path / 'none'}" in err


def test_a_folder_without_a_bundle(tiny_qwen2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = ended(capsys, tiny_qwen2, "--checkpoint", tiny_qwen2)
    assert code == 2
    assert "is not a bundle" in err


def test_a_board_needs_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_board, "ROOT", tmp_path)
    with pytest.raises(BadInput, match="needs a checkout"):
        on_board.expect("virtual")


def test_an_unknown_board_is_refused_first(
    tiny_qwen2: Path, bundle_s8: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = ended(capsys, bundle_s8, "--checkpoint", tiny_qwen2, "--board", "no-such-board")
    assert (code, out) == (2, "")
    assert "no board is named 'no-such-board': there are " in err
    assert "virtual" in err
    assert "files" not in err


def test_a_board_without_a_report_comes_with_the_task_s_advice(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        on_board.examine(str(tmp_path / "none.yaml"), None)
    error, *advice = str(caught.value).splitlines()
    assert error.startswith(f"board {tmp_path / 'none.yaml'} gave no report: ")
    assert advice


@pytest.mark.parametrize(("there", "said"), [("b" * 64, "has another bundle"), ("a" * 64, ""), ("", "")])
def test_another_bundle_on_the_board_is_reported(there: str, said: str) -> None:
    reports = [Report("out/x", "cpu", "place", "ax", manifest=digest) for digest in ("a" * 64, there)]
    found = on_board.other_bundle(Report.parse(reports[0].json()), Report.parse(reports[1].json()), "virtual")
    assert said in found if said else not found

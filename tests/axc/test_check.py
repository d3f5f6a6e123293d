"""The check passes correct bundles and finds faults."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from axc import build, check
from axc.cli import main
from axc.expected import Answer
from axrun.agreement import NOISE, Agreement, Rows, divergence, logit_errors, update_errors
from axrun.errors import CheckFailed
from axrun.format import axmodel
from axrun.format.bundle import sha256
from axrun.format.dtypes import bf16_to_f32, f32_to_bf16
from tests.doctor.axmodels import sign


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
    assert seen["model"]["same_tokens"] == seen["model"]["compared_tokens"] == len(seen["model"]["margins"]) == 2
    stages = ("prefill", "decode", "history", "rollback")
    assert [(entry["part"], entry["stage"]) for entry in seen["layers"]] == [
        *((f"layer {index}", stage) for index in range(4) for stage in stages),
        ("post", "logits"),
    ]
    assert [entry["rows"] for entry in seen["layers"]][:4] == [32, 6, 217, 32]
    assert all(entry["cosine"] > 0.999 and 0 < entry["rms"] <= entry["worst"] < 0.02 for entry in seen["layers"])
    assert seen["reach"] == "255 tokens, the whole context"
    assert 0 < seen["model"]["mean_kld"] < 4e-3
    assert seen["failures"] == []


@pytest.mark.parametrize("planted", ["a flipped scale", "a lost norm"])
def test_a_planted_fault_is_found(
    planted: str, tiny_qwen2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The manifest is updated, so only a comparison with the checkpoint finds the fault."""
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
    assert "\nThe bundle is kept for examination: axc doctor " in error
    assert len(error.strip().splitlines()) <= 3


def plan_of(checkpoint: Path, bundle: Path) -> build.Plan:
    return build.plan(build.Options(checkpoint, bundle, prefill_len=32, kv_cache_len=255, last_kv_cache_len=(32, 128)))


@pytest.fixture
def bundle(bundle_s8: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(bundle_s8, tmp_path / "bundle"))


def found(plan: build.Plan, level: int = 2) -> str:
    with pytest.raises(CheckFailed) as failed:
        check.check(plan, level, "what is 1+1=", lambda line: None)
    return str(failed.value)


def test_a_different_tokenizer_is_found(tiny_qwen2: Path, bundle: Path) -> None:
    path = bundle / "hf" / "tokenizer.json"
    values = json.loads(path.read_text())
    values["normalizer"] = {"type": "Lowercase"} | {"type": "Replace", "pattern": {"String": "1"}, "content": "2"}
    path.write_text(json.dumps(values))
    sign(bundle, "hf/tokenizer.json")
    said = found(plan_of(tiny_qwen2, bundle))
    assert "the prompt is [" in said
    assert "by AutoTokenizer" in said


@pytest.mark.parametrize("template", ["{{ messages[0]['content'] }}", None])
def test_a_different_template_is_found(template: str | None, tiny_qwen2: Path, bundle: Path) -> None:
    path = bundle / "hf" / "tokenizer_config.json"
    values = json.loads(path.read_text())
    values["chat_template"] = template
    path.write_text(json.dumps(values))
    sign(bundle, "hf/tokenizer_config.json")
    said = found(plan_of(tiny_qwen2, bundle))
    assert ("chat template is [" if template else "AutoTokenizer has a chat template, the bundle has none") in said


@pytest.mark.parametrize(("margin", "gap", "good"), [(0.3, 0.2, False), (0.3, 0.4, True), (float("nan"), 0.4, False)])
def test_another_token_is_accepted_only_in_a_near_tie(margin: float, gap: float, good: bool) -> None:
    """Token 1 instead of the reference's token 0, which leads by `margin`."""
    wanted = np.array([[1.0, 1.0 - margin, -2.0], [1.0, 0.0, 3.0]], np.float32)
    ours = np.array([[0.9, 1.0, -2.0], [1.0, 0.0, 3.0]], np.float32)
    chosen, faults = check.compared(Answer([5], [0, 2], wanted), ours, gap)
    assert chosen == [1, 2]
    assert (not faults) is good


def test_nonfinite_logits_are_a_fault() -> None:
    wanted, ours = np.zeros((1, 3), np.float32), np.full((1, 3), np.nan, np.float32)
    assert check.compared(Answer([5], [0], wanted), ours, 1.0)[1]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nonfinite_values_fail_every_bound(value: float) -> None:
    good = np.ones((4, 8), np.float32)
    bad = good.copy()
    bad[2, 3] = value
    for rows in (
        update_errors(bad, good, np.asarray(good / 2, np.float32), "bf16"),
        logit_errors(np.asarray(bad + np.arange(8), np.float32), np.asarray(good + np.arange(8), np.float32)),
    ):
        entry = Agreement.of("layer 0", "decode", Rows(*(np.asarray(each, np.float64) for each in rows)))
        assert "expected at most" in entry.fault(NOISE["s4"])
    assert not divergence(good, bad).mean() <= NOISE["s4"].kld


def test_rounding_of_the_hidden_state_is_not_a_fault() -> None:
    """A correct layer with rounded input and output."""
    random = np.random.default_rng(4)
    update = random.standard_normal((50, 64), np.float32)
    given = np.asarray(random.standard_normal((50, 64), np.float32) * 100, np.float32)
    expected = np.asarray(given + update, np.float32)
    ours = bf16_to_f32(f32_to_bf16(np.asarray(bf16_to_f32(f32_to_bf16(given)) + update, np.float32)))
    assert update_errors(ours, expected, given, "bf16").error.max() < 1e-4
    assert update_errors(ours, expected, given, "fp32").error.min() > 0.05


def test_a_prompt_that_spells_special_tokens(tiny_qwen2: Path, bundle: Path) -> None:
    check.check(plan_of(tiny_qwen2, bundle), 2, "what is <|im_end|>1+1=", lambda line: None)


def test_templates_for_text_and_for_parts_are_both_compared(tiny_qwen2: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_qwen2, tmp_path / "hf"))
    parts = "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}="
    (folder / "chat_template.jinja").write_text(parts)
    plan = plan_of(folder, tmp_path / "out")
    build.build(plan)
    check.check(plan, 2, "1+1", lambda line: None)

"""axrun eval compared with transformers: every metric recomputed from full distributions with torch."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from axc.logits import Options, write
from axrun.cli import main
from axrun.format import logits as reference_logits
from axrun.format.bundle import Bundle
from axrun.format.logits import NAME, ReferenceLogits
from axrun.generate import generate
from axrun.measure.evaluate import Quality, evaluate, measure
from axrun.model import Model
from axrun.sampling import Sampling
from axrun.sequence import Sequence
from tests.conftest import Builder

ROOT = Path(__file__).parents[2]
WINDOW, WINDOWS, ANSWER = 120, 4, 24


@pytest.fixture(scope="session")
def files(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Reference logits of the held-out text, by the number of most likely tokens they keep."""
    folder = tmp_path_factory.mktemp("reference")
    text = tiny_qwen2 / "heldout.txt"
    options = {
        top: Options(
            *(tiny_qwen2, text, folder / f"{top}.npz"),
            window=WINDOW,
            tokens=WINDOWS * WINDOW,
            top_k=top,
            greedy_tokens=answer,
        )
        for top, answer in ((640, 0), (32, ANSWER), (1, 0))
    }
    return {top: write(made)[0] for top, made in options.items()}


@pytest.fixture(scope="session")
def bundle_s4(build_tiny: Builder) -> Path:
    return build_tiny(weight_type="s4")


@torch.inference_mode()
def recomputed(model: Model, reference: Any, logits: ReferenceLogits) -> dict[str, float]:
    """The metrics from the full distributions of both models."""
    tokens = torch.from_numpy(logits.tokens.astype(np.int64))
    ours = []
    for window in tokens.tolist():
        model.decoder.cache.reset()
        ours.append(torch.from_numpy(model.forward(window, logits="all")))
    theirs = reference(tokens).logits
    p, q = (torch.log_softmax(rows[:, :-1].double(), dim=2) for rows in (theirs, torch.stack(ours)))
    kld = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(2).flatten()
    followed = tokens[:, 1:].flatten()
    return {
        "perplexity": math.exp(torch.nn.functional.nll_loss(q.flatten(0, 1), followed)),
        "reference_perplexity": math.exp(torch.nn.functional.nll_loss(p.flatten(0, 1), followed)),
        "mean_kld": float(kld.mean()),
        "median_kld": float(kld.quantile(0.5)),
        "kld_99_9": float(kld.quantile(0.999)),
        "max_kld": float(kld.max()),
        "top1_agreement": float((p.argmax(2) == q.argmax(2)).double().mean()),
    }


@pytest.mark.parametrize("name", ["bundle_s8", "bundle_s4", "bundle_fp32"])
def test_the_metrics_match_the_full_distributions(
    name: str, engine: str, files: dict[int, Path], reference: Any, request: pytest.FixtureRequest
) -> None:
    model = Model.load(Bundle.open(request.getfixturevalue(name)), engine)
    logits = reference_logits.read(files[640])
    found, expected = measure(model, logits), recomputed(model, reference, logits)
    assert found.positions == WINDOWS * (WINDOW - 1)
    assert found.divergence == "exact"
    for key, value in expected.items():
        assert getattr(found, key) == pytest.approx(value, rel=1e-4, abs=2e-7), key
    assert found.perplexity_ratio == pytest.approx(expected["perplexity"] / expected["reference_perplexity"], rel=1e-5)
    assert (found.mean_kld < 1e-6) == (name == "bundle_fp32")


def test_fewer_buckets_give_a_tight_lower_bound(files: dict[int, Path], bundle_s4: Path) -> None:
    model = Model.load(Bundle.open(bundle_s4))
    exact, many, one = (measure(model, reference_logits.read(files[top])) for top in (640, 32, 1))
    assert (exact.divergence, many.divergence, one.divergence) == ("exact", "lower bound", "lower bound")
    assert exact.logits_sha256 == many.logits_sha256 == one.logits_sha256
    assert 0 < one.mean_kld < many.mean_kld < exact.mean_kld
    assert many.mean_kld > 0.9 * exact.mean_kld
    for bound in (many, one):
        assert bound.max_kld <= exact.max_kld + 1e-6
        assert bound.perplexity == exact.perplexity
        assert bound.top1_agreement == exact.top1_agreement


@pytest.mark.parametrize("name", ["bundle_s4", "bundle_fp32"])
def test_greedy_agreement_counts_to_the_first_difference(
    name: str, engine: str, files: dict[int, Path], reference: Any, request: pytest.FixtureRequest
) -> None:
    model = Model.load(Bundle.open(request.getfixturevalue(name)), engine)
    logits = reference_logits.read(files[32])
    found, same = measure(model, logits), []
    for window in logits.tokens.astype(np.int64)[:, : WINDOW // 2]:
        given = torch.from_numpy(window)[None]
        out = reference.generate(given, max_new_tokens=ANSWER, do_sample=False, eos_token_id=None, pad_token_id=0)
        model.decoder.cache.reset()
        ours = [token.id for token in generate(Sequence(model), window.tolist(), Sampling(), ANSWER)]
        theirs = out[0, WINDOW // 2 :].tolist()
        same.append(next((i for i in range(ANSWER) if ours[i] != theirs[i]), ANSWER))
    assert (found.greedy_answers, found.greedy_tokens) == (WINDOWS, ANSWER)
    assert found.greedy_same == pytest.approx(sum(same) / WINDOWS)
    assert (found.greedy_same == ANSWER) == (name == "bundle_fp32")


def test_without_continuations_there_is_no_greedy_metric(tiny_qwen2: Path, tmp_path: Path, model_fp32: Model) -> None:
    text = tiny_qwen2 / "heldout.txt"
    _, logits = write(Options(tiny_qwen2, text, tmp_path / "x", tokens=80, window=40, greedy_tokens=0))
    found = measure(model_fp32, logits)
    assert (found.greedy_answers, found.greedy_same) == (0, None)


def test_the_table_and_the_json(bundle_s8: Path, files: dict[int, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(bundle_s8), "--reference", str(files[32]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    quality = evaluate(bundle_s8, files[32]).quality
    assert found["mean_kld"] == pytest.approx(quality.mean_kld, rel=1e-6)
    assert found["divergence"] == "lower bound"
    assert (found["bundle"], found["maker"], found["engine"]) == ("qwen2", "cpu", "ax")
    assert found["compiler"].startswith("axc ")
    for key, path in (("manifest_sha256", bundle_s8 / "manifest.json"), ("reference_sha256", files[32])):
        done = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
        assert done.stdout.split()[0] == found[key]
    assert set(found) >= set(Quality.__dataclass_fields__)
    assert main(["eval", str(bundle_s8), "--reference", str(files[32])]) == 0
    table = capsys.readouterr().out
    assert f"in {quality.windows} windows of {quality.window}" in table
    assert f"{quality.perplexity:.4f}" in table
    assert f"{quality.mean_kld:.6f}  (a lower bound)" in table


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--max-kld", "1", "--min-top1", "0.5"], 0, ""),
        (["--max-kld", "0"], 1, "mean KLD of .*, expected at most 0.0"),
        (["--min-top1", "1.01"], 1, "same top token in .*, expected at least 101.00%"),
        (["--max-kld", "nan"], 1, "mean KLD"),
    ],
)
def test_gates_can_fail(
    bundle_s8: Path, files: dict[int, Path], capsys: pytest.CaptureFixture[str], flags: list[str], code: int, words: str
) -> None:
    assert main(["eval", str(bundle_s8), "--reference", str(files[32]), "--json", *flags]) == code
    out, err = capsys.readouterr()
    assert json.loads(out)["windows"] == WINDOWS  # the metrics are printed anyway
    assert re.search(words, err)


def test_the_reference_in_the_bundle_is_the_default(
    bundle_s8: Path, tiny_qwen2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(bundle_s8, tmp_path / "bundle"))
    assert main(["eval", str(bundle)]) == 2
    assert "axc reference" in capsys.readouterr().err
    write(Options(tiny_qwen2, tiny_qwen2 / "heldout.txt", bundle=bundle, tokens=300, window=100, greedy_tokens=2))
    assert main(["eval", str(bundle), "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["windows"] == 3
    (bundle / NAME).write_bytes((bundle / NAME).read_bytes()[:-1] + b"\1")
    assert main(["eval", str(bundle), "--verify"]) == 1


def test_a_reference_that_does_not_fit_is_refused(
    build_tiny: Builder, files: dict[int, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    small = build_tiny(kv_cache_len=100, last_kv_cache_len=())
    assert main(["eval", str(small), "--reference", str(files[32])]) == 2
    assert "the bundle's context is 100\nWrite it with `axc reference --window 100`" in capsys.readouterr().err


def test_a_reference_of_another_model_is_refused(
    bundle_s8: Path, files: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(bundle_s8, tmp_path / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["model"]["vocab_size"] = 7
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    assert main(["eval", str(bundle), "--reference", str(files[1])]) == 2
    advice = "Write one from this bundle's checkpoint: axc reference --input_path CHECKPOINT --text FILE --bundle "
    assert f"the bundle has 7: it was written from another checkpoint\n{advice}{bundle}\n" in capsys.readouterr().err


def test_a_window_may_fill_the_context(build_tiny: Builder, files: dict[int, Path]) -> None:
    full = build_tiny(kv_cache_len=WINDOW - 1, last_kv_cache_len=())
    assert evaluate(full, files[32]).quality.positions == WINDOWS * (WINDOW - 1)


def test_it_needs_no_torch(bundle_s8: Path, files: dict[int, Path]) -> None:
    script = (
        "import sys\n"
        "for name in ('axc', 'onnx', 'torch', 'transformers', 'safetensors'): sys.modules[name] = None\n"
        "from axrun.cli import main\n"
        f"sys.exit(main(['eval', {str(bundle_s8)!r}, '--reference', {str(files[1])!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_one_window_is_counted_as_one(bundle_s8: Path, files: dict[int, Path]) -> None:
    found = evaluate(bundle_s8, files[32])
    one = replace(found, quality=replace(found.quality, windows=1, greedy_answers=1))
    text = "\n".join(one.table())
    assert f" in 1 window of {found.quality.window}\n" in text
    assert re.search(r"tokens, 1 answer$", text, re.MULTILINE)

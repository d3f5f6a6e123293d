"""The checkpoint's generation_config.json: applied on request like transformers does, otherwise reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from axrun.errors import BadInput
from axrun.format.bundle import Bundle
from axrun.generate import generate
from axrun.model import Model
from axrun.sampling import Sampling
from axrun.sampling.checkpoint import sampling_of
from axrun.sequence import Sequence
from tests.axrun.test_sampling import probabilities
from tests.doctor.axmodels import sign

QWEN2 = {"do_sample": True, "repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20}


@pytest.fixture
def bundle(bundle_fp32: Path, tmp_path: Path) -> Any:
    """Creates the float32 bundle with another generation_config.json."""

    def make(config: Any) -> Bundle:
        folder = tmp_path / "bundle"
        shutil.copytree(bundle_fp32, folder, copy_function=lambda source, to: Path(to).symlink_to(source))
        file = folder / "hf" / "generation_config.json"
        file.unlink()
        file.write_text(json.dumps(config))
        sign(folder, "hf/generation_config.json")
        return Bundle.open(folder)

    return make


def test_it_is_reported_and_not_applied_by_default(bundle: Any) -> None:
    opened = bundle(QWEN2)
    sampling, remark = sampling_of(opened)
    assert sampling == Sampling(penalty_window=64)
    assert remark == (
        "settings of the checkpoint's generation_config.json that are not applied: "
        "temperature 0.7, top_k 20, top_p 0.8, "
        "repetition_penalty 1.1; apply it with --generation-config"
    )
    assert sampling_of(opened, True) == (Sampling(0.7, 1.1, None, 0.8, 20), "")
    assert sampling_of(opened, True, temperature=0.0)[0].repetition_penalty == 1.1
    remark = sampling_of(opened, temperature=0.7, top_p=0.8)[1]
    assert ": top_k 20, repetition_penalty 1.1;" in remark


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, Sampling()),
        ({"temperature": 0.6, "top_p": 0.9}, Sampling()),  # without effect, since do_sample is absent
        ({"do_sample": True}, Sampling(1.0, top_k=50)),
        ({"do_sample": True, "top_k": 0, "min_p": 0.1, "top_p": None}, Sampling(1.0, min_p=0.1)),
        ({"repetition_penalty": 1.3}, Sampling(repetition_penalty=1.3)),
    ],
)
def test_defaults_are_those_of_transformers(bundle: Any, config: dict[str, Any], expected: Sampling) -> None:
    assert sampling_of(bundle(config), True) == (expected, "")


def test_unsupported_settings_are_reported_in_one_line(bundle: Any) -> None:
    opened = bundle({"num_beams": 4, "no_repeat_ngram_size": 3, "bad_words_ids": [[5]], "typical_p": 1.0})
    for follow in (False, True):
        remark = sampling_of(opened, follow)[1]
        assert remark.endswith("not applied: num_beams 4, no_repeat_ngram_size 3, bad_words_ids [[5]]")
        assert "\n" not in remark


@pytest.mark.parametrize(
    ("config", "follow", "words"),
    [
        ({"do_sample": True, "temperature": "hot"}, True, "temperature is 'hot'"),
        ({"suppress_tokens": "no"}, False, "suppress_tokens is 'no'"),
        ({"suppress_tokens": [1, "2"]}, False, "expected a list of token ids"),
        ([1], False, "expected a JSON object"),
    ],
)
def test_a_damaged_file_is_reported(bundle: Any, config: Any, follow: bool, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        sampling_of(bundle(config), follow)


def test_tokens_match_transformers_with_the_same_file(
    bundle: Any, model_fp32: Model, reference: Any, heldout: list[int]
) -> None:
    """Also suppressed tokens, among them the first ones of an unrestricted answer, and an id outside the vocabulary."""
    given = torch.tensor([heldout[:60]])
    config = reference.generation_config.__class__
    free = reference.generate(given, generation_config=config(), do_sample=False, max_new_tokens=20, pad_token_id=0)
    suppressed = sorted({*free[0, 60:64].tolist()})
    wanted = {"repetition_penalty": 1.6, "suppress_tokens": suppressed}
    theirs = reference.generate(given, generation_config=config(**wanted), max_new_tokens=20, pad_token_id=0)
    sampling, _ = sampling_of(bundle({**wanted, "suppress_tokens": [*suppressed, -1, 10**9]}), True)
    ours = [token.id for token in generate(Sequence(model_fp32), heldout[:60], sampling, 20)]
    wanted_ids = theirs[0, 60:].tolist()  # up to the stop token, which ends our answer only if it is passed
    assert len(wanted_ids) >= 10
    assert ours[: len(wanted_ids)] == wanted_ids != free[0, 60 : 60 + len(wanted_ids)].tolist()


def test_min_p_matches_transformers() -> None:
    from transformers import MinPLogitsWarper

    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(0)) * 3
    for least in (0.01, 0.2, 1.0):
        warper: Any = MinPLogitsWarper(least)
        theirs = torch.softmax(warper(None, logits.clone()).double(), -1)[0].numpy()
        ours = probabilities(logits[0].numpy(), [], Sampling(1.0, min_p=least))
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-12)

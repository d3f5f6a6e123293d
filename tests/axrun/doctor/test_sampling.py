"""The known results match transformers, and the stage detects a faulty sampler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from axrun.doctor import sampling as stage
from axrun.doctor.report import Finding
from axrun.doctor.sampling import CASES, LOGITS, Case, sampling
from axrun.doctor.stops import stops
from axrun.format.bundle import Bundle
from tests.doctor.axmodels import sign


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_known_results_match_transformers(case: Case) -> None:
    wanted, window = case.sampling, case.sampling.penalty_window
    processors = LogitsProcessorList()
    if wanted.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(wanted.repetition_penalty))
    processors.append(TemperatureLogitsWarper(float(wanted.temperature)))
    if wanted.top_k:
        processors.append(TopKLogitsWarper(wanted.top_k))
    if wanted.top_p < 1:
        processors.append(TopPLogitsWarper(wanted.top_p))
    # without ties, for which torch has no rule
    logits = torch.tensor([[value - 1e-4 * index for index, value in enumerate(LOGITS)]])
    past = torch.tensor([case.past[-window:] if window else case.past], dtype=torch.int64)
    processed: Any = processors
    shares = torch.softmax(processed(past, logits), dim=-1)[0].numpy()
    np.testing.assert_allclose(case.expected(), shares, atol=2e-3)


def test_a_healthy_bundle(examined: Path) -> None:
    assert isinstance(sampling(Bundle.open(examined)), str)


@pytest.mark.parametrize(
    ("name", "broken", "part"),
    [
        ("processors.RepetitionPenalty.__call__", lambda self, logits, ids, start: None, "repetition penalty"),
        ("sampler.draw", lambda kept, chance: 0, "seed 0"),
        ("draw.likeliest", lambda kept, count, scratch: np.arange(2), "top-k"),
    ],
)
def test_a_faulty_sampler_is_found(
    name: str, broken: object, part: str, examined: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"axrun.sampling.{name}", broken)
    found = sampling(Bundle.open(examined))
    assert isinstance(found, Finding)
    assert part in found.part
    assert found.file in (stage.CODE, "numpy")


def test_a_wrong_choice_for_a_reference_row_is_found(examined: Path) -> None:
    found = sampling(Bundle.open(examined), [(np.array([0.0, 1.0, 0.5]), 2)])
    assert isinstance(found, Finding)
    assert (found.expected, found.seen) == ("token 2", "token 1")


def test_different_stop_ids_are_found(copy: Path) -> None:
    file = copy / "hf" / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": 5}))
    sign(copy, "hf/generation_config.json")
    found = stops(Bundle.open(copy))
    assert isinstance(found, Finding)
    assert (found.part, found.file) == ("stop ids", "hf/generation_config.json")
    assert "[5] stop" in found.cause


def test_an_invalid_post_config_is_found(copy: Path) -> None:
    file = copy / "post_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "top_p": 7}))
    found = sampling(Bundle.open(copy))
    assert isinstance(found, Finding)
    assert found.file == "post_config.json"
    assert "top_p is 7" in found.seen

"""The choice of matrices with 8 bits: by the divergence that their 4-bit error causes, per weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from axc import config
from axc.calibration import bits, run
from axc.calibration.linears import Matrix
from axc.calibration.options import Options
from axc.calibration.streamed import Streamed
from axc.checkpoints import Checkpoint
from axc.compile import weights
from axc.quantizer import gptq
from axc.weights.sources import Stored


@torch.no_grad()
def test_effects_are_those_of_rounding_one_matrix(tiny_qwen2: Path) -> None:
    """The divergence of transformers' model with this matrix rounded from itself. One sample of each token estimates
    it, which leaves a factor to chance.
    """
    ids = torch.tensor(AutoTokenizer.from_pretrained(tiny_qwen2).encode((tiny_qwen2 / "heldout.txt").read_text()))
    ids = ids[None, : 48 * 64]
    checkpoint = Checkpoint.open(tiny_qwen2)
    model = config.load(checkpoint)
    streamed = Streamed(checkpoint.tied(), model)
    found, _ = run.matrices(weights(model), streamed, Options(tiny_qwen2))
    with torch.enable_grad():
        estimated = bits.effects(streamed, found, ids)

    theirs: Any = AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.float32).eval()
    sequences = ids.reshape(-1, 64)
    exact = theirs(sequences).logits.log_softmax(-1)
    ratios = []
    for matrix in found:
        weight = theirs.get_parameter(matrix.name)
        own = weight.clone()
        scales = gptq.search_scales(own, torch.ones(own.shape[1]), "INT4", matrix.block)
        groups = own.view(*scales.shape, -1) / scales[..., None]
        weight.copy_((groups.round().clamp(-8, 7) * scales[..., None]).view(own.shape))
        other = theirs(sequences).logits.log_softmax(-1)
        weight.copy_(own)
        ratios.append(estimated[matrix.name] / float((exact.exp() * (exact - other)).sum(-1).mean()))
    assert len(ratios) == len(estimated) == 28
    assert 0.7 < np.median(ratios) < 1.4, ratios
    assert 0.3 < min(ratios) < max(ratios) < 3, ratios


def test_the_budget_goes_to_the_costliest_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to the costliest matrices; and no more than there is."""
    sizes = {"large": 4 * 1024, "small": 1024, "dull": 1024, "huge": 10 * 1024}
    matrices = [Matrix(name, Stored(name, (size // 64, 64)), [], 0, "s4", 32) for name, size in sizes.items()]
    costs = {"large": 3.0, "small": 2.0, "dull": 0.1, "huge": 0.5}
    monkeypatch.setattr(bits, "effects", lambda *_: costs)
    total = sum(sizes.values())
    for widened, wide in (
        (1024, {"small"}),
        (5 * 1024 - 1, {"small", "dull"}),  # the large one does not fit
        (5 * 1024, {"small", "large"}),
    ):
        chosen = bits.choose(None, matrices, None, 4.5 + 3.75 * widened / total)  # type: ignore[arg-type]
        assert {matrix.name for matrix in chosen if matrix.weight_type == "s8"} == wide

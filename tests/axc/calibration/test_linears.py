"""The linears of transformers' model that compute an axmodel's matrices, and their inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from axc import config
from axc.calibration import head, run
from axc.calibration import streamed as streaming
from axc.calibration.options import Options
from axc.calibration.streamed import Streamed
from axc.checkpoints import Checkpoint
from axc.compile import weights
from axc.weights import float32
from tests.axc.test_families import random_model

FAMILIES = ["llama", "phi3", "gemma2", "glm", "glm4", "granite", "starcoder2", "stablelm", "exaone4", "ernie4_5"]
FAMILIES += ["cohere", "nemotron", "olmo", "olmo3", "seed_oss"]


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_find_their_linears(family: str, tmp_path: Path) -> None:
    """What an axmodel's matrices hold, put back into transformers' layers, is what transformers has there."""
    theirs = random_model(family, {})
    theirs.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    model = config.load(checkpoint)
    checkpoint = checkpoint.tied() if model.tie_word_embeddings else checkpoint
    streamed = Streamed(checkpoint, model)
    found, others = run.matrices(weights(model), streamed, Options(tmp_path))
    assert not others
    assert {matrix.layer for matrix in found} == {0, 1}
    for index in range(2):
        layer, prefix = streamed.load(index), f"{streamed.prefix}.{index}."
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data.zero_()
        for matrix in found:
            if matrix.layer == index:
                values = torch.from_numpy(float32(matrix.name, matrix.source, checkpoint))
                run.put(layer, prefix, matrix, values)
        for name, weight in layer.named_parameters():
            expected = theirs.get_parameter(prefix + name).detach()
            torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_the_head_gets(family: str, tmp_path: Path) -> None:
    """That of transformers' whole model, from the outputs of its last layer."""
    theirs: Any = random_model(family, {}).float().eval()
    theirs.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    model = config.load(checkpoint)
    streamed = Streamed(checkpoint.tied() if model.tie_word_embeddings else checkpoint, model)
    found = head.find(weights(model), streamed)
    assert found is not None
    assert found.source.shape == tuple(theirs.get_output_embeddings().weight.shape)
    seen: list[Any] = []
    last = theirs.get_submodule(f"{streamed.prefix}.{len(streamed.layers) - 1}")
    last.register_forward_hook(lambda _, given, out: seen.append(out[0] if isinstance(out, tuple) else out))
    theirs.get_output_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    theirs(torch.arange(12)[None])
    with streamed.before_head() as before:
        torch.testing.assert_close(before(seen[0]), seen[1][0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("drifted", [False, True])
@torch.no_grad()
def test_inputs_of_linears_without_a_norm_before_them(drifted: bool, tmp_path: Path) -> None:
    """They are the layer's own inputs, which its outputs replace."""
    random_model("exaone4", {}).save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    model = config.load(checkpoint)
    streamed = Streamed(checkpoint.tied() if model.tie_word_embeddings else checkpoint, model)
    x, calls = streamed.enter(torch.arange(24).reshape(2, 12))
    y, layer = torch.randn(x.shape) if drifted else x, streamed.load(0)
    exact = y.clone()
    (seen,) = run._observe(layer, ["self_attn.q_proj"], run.Inputs(exact, x if drifted else None, calls[0]))
    for window, outputs in zip(y, exact, strict=True):
        assert torch.equal(streaming.run(layer, calls[0], window), outputs)
    rows, drift = x.flatten(0, 2), (y - x).flatten(0, 2)
    torch.testing.assert_close(seen.hessian, rows.T @ rows, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen.drift, drift.T @ rows, rtol=1e-4, atol=1e-4)

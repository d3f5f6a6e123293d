"""Calibration of checkpoints in other forms than floats that transformers reads: fp8, and models it has no code for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from safetensors.torch import save_file

from axc import build, config, families
from axc.calibration import run, text
from axc.calibration.options import Options, wanted
from axc.calibration.twin import Twin
from axc.checkpoints import Checkpoint
from axc.config_json import Reader
from axc.config_rope import KINDS, read_rope, written
from axc.reference import Reference
from axc.rope import Rope
from axrun.format.bundle import Bundle
from axrun.measure.evaluate import log_softmax
from axrun.model import Model
from tests.axc import quantised_files
from tests.axc.as_transformers import VOCABULARY, plan
from tests.axc.quantised_files import FORMS
from tests.axc.test_families import TWINS, random_model

WORDS = text.Text(np.random.default_rng(0).integers(3, VOCABULARY, (32, 64)), "0" * 64, ("random",))
IDS = np.random.default_rng(1).integers(3, VOCABULARY, 100)


def calibrated(folder: Path, output: Path, **options: Any) -> Path:
    checkpoint = Checkpoint.open(folder)
    model = config.load(checkpoint)
    checkpoint = checkpoint.tied() if model.tie_word_embeddings else checkpoint
    return run.on(WORDS, checkpoint, model, Options(folder, window=64, tokens=2048, **options), output)


def divergence(planned: build.Plan, exact: NDArray[np.float32]) -> float:
    build.build(planned)
    p, q = (
        log_softmax(logits)
        for logits in (exact, Model.load(Bundle.open(planned.output)).forward(IDS.tolist(), 0, logits="all"))
    )
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


@pytest.mark.parametrize("name", ["fp8-blocks", "fp8-tensor"])
def test_an_fp8_folder_is_calibrated(name: str, tmp_path: Path) -> None:
    """By default, for s4; its logits are nearer to the checkpoint's than rounded to nearest."""
    folder = tmp_path / "fp8"
    quantised_files.write(folder, FORMS[name])
    assert wanted(folder, "s4", None, None, None, [])
    output = calibrated(folder, tmp_path / "out.safetensors")
    given: dict[str, Any] = {"kv_cache_len": 127, "post_weight_type": None}
    planned = plan(folder, tmp_path / "gptq", calibrated=output, **{**given, "weight_type": None})
    assert planned.notices[0] == "14 matrices stored as fp8 dequantised, and stored again as s4, calibrated: not exact"
    exact = Reference(folder).logits(IDS)
    nearest = divergence(plan(folder, tmp_path / "rtn", **{**given, "weight_type": "s4"}), exact)
    assert divergence(planned, exact) < 0.6 * nearest


def both(kind: str, folder: Path) -> tuple[Path, Path]:
    """A checkpoint of a model that transformers does not have, and that of a model which computes the same."""
    twin, particular, rearranged = TWINS[kind]
    model = random_model(twin, particular)
    model.save_pretrained(folder / "twin")
    tensors, values = rearranged(model.state_dict(), model.config.to_dict())
    (folder / kind).mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / kind / "model.safetensors")
    (folder / kind / "config.json").write_text(json.dumps({**values, "model_type": kind}))
    return folder / kind, folder / "twin"


@pytest.mark.parametrize(("kind", "options"), [*((kind, {}) for kind in TWINS), ("chatglm", {"bits": 5.5})])
def test_a_model_without_code_is_calibrated_as_its_twin(kind: str, options: Any, tmp_path: Path) -> None:
    """To the same levels and scales as those tensors under the twin's names, and a bundle is made of them."""
    folder, twin = both(kind, tmp_path)
    one = calibrated(folder, tmp_path / "one.safetensors", **options)
    other = calibrated(twin, tmp_path / "other.safetensors", **options)
    found, expected = load_file(one), load_file(other)
    assert found.keys() == expected.keys()
    assert len(found) == 30  # levels and scales of 14 matrices and the head
    for name, array in expected.items():
        assert np.array_equal(found[name], array), name
    planned = plan(folder, tmp_path / "bundle", calibrated=one, weight_type=None, post_weight_type=None)
    assert build.build(planned).fresh  # measures the errors against the checkpoint's tensors


ROPES = [
    Rope(5e5),
    Rope(1e4, partial=0.5),
    Rope(1e4, "linear", 4.0),
    Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192),
    Rope(1e6, "yarn", 4.0, original_max_position_embeddings=64, attention_factor=1.1, beta_fast=30.0, truncate=False),
    Rope(1e4, "longrope", original_max_position_embeddings=64, divisors=(1.0, 1.5), long_divisors=(2.0, 4.0)),
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope.kind)
def test_a_rope_is_read_as_it_was_written(rope: Rope) -> None:
    values = {"rope_parameters": written(rope)}
    assert read_rope(Reader(values, Path("config.json")), 128, 4, partial=True) == rope


def test_every_kind_of_rope_is_written() -> None:
    assert {rope.kind for rope in ROPES} == KINDS.keys() - {"su"}


@pytest.mark.parametrize("kind", [name for name, family in families.FAMILIES.items() if family.twin])
def test_a_twin_has_the_same_config(kind: str, tmp_path: Path) -> None:
    """But for its name, and what its own config has in addition."""
    model = config.load(Checkpoint.open(both(kind, tmp_path)[0]))
    twin = Twin.find(model)
    assert twin is not None
    _, other = families.read_config(dict(twin.config), Path("config.json"), None)
    for field in ("hidden_size", "num_hidden_layers", "head_dim", "kv_size", "rms_norm_eps", "rope", "context"):
        assert getattr(other, field) == getattr(model, field)

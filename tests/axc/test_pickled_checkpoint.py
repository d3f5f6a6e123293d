"""pytorch_model.bin gives the same bundle as safetensors, and code in a pickle never runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.axc.axc import assert_build_refused, assert_done, assert_same_files, llm_build
from tests.axc.conftest import Breakable

NORM = "model.norm.weight"


@pytest.fixture
def folder(checkpoint: Breakable) -> Path:
    """The shipped checkpoint, its weights still to be written as .bin."""
    folder = checkpoint()
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def tensors(pristine: Path) -> dict[str, torch.Tensor]:
    return load_file(pristine / "model.safetensors")


@pytest.fixture(scope="module")
def from_safetensors(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle that the same tensors give as safetensors."""
    output = tmp_path_factory.mktemp("bundle") / "tiny"
    assert_done(llm_build(pristine, output))
    return output


def save(folder: Path, content: object, *, legacy: bool = False) -> None:
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)


def save_sharded(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    files = [f"pytorch_model-{i:05d}-of-00002.bin" for i in (1, 2)]
    names = sorted(tensors)
    for index, file in enumerate(files):
        torch.save({name: tensors[name] for name in names[index::2]}, folder / file)
    weight_map = {name: files[i % 2] for i, name in enumerate(names)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def assert_builds_the_same(folder: Path, output: Path, from_safetensors: Path, *flags: object) -> None:
    assert_done(llm_build(folder, output, *flags))
    assert_same_files(output, from_safetensors, "manifest.json")
    ours, theirs = (json.loads((path / "manifest.json").read_text()) for path in (output, from_safetensors))
    weights = {name for name in ours["inputs"] if name.startswith("pytorch_model")}
    assert weights
    assert ours.pop("inputs").keys() - weights == theirs.pop("inputs").keys() - {"model.safetensors"}
    assert ours == theirs


def test_tensors_stored_as_the_negative_of_their_bytes(
    folder: Path, tensors: dict[str, torch.Tensor], tmp_path: Path, from_safetensors: Path
) -> None:
    save(folder, {**tensors, NORM: torch._neg_view(-tensors[NORM])})
    stored = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert stored[NORM].is_neg()
    assert_builds_the_same(folder, tmp_path / "bundle", from_safetensors)


def test_one_file(folder: Path, tensors: dict[str, Any], tmp_path: Path, from_safetensors: Path) -> None:
    save(folder, tensors)
    assert_builds_the_same(folder, tmp_path / "bundle", from_safetensors)


def test_the_format_of_old_torch(folder: Path, tensors: dict[str, Any], tmp_path: Path, from_safetensors: Path) -> None:
    save(folder, tensors, legacy=True)
    assert_builds_the_same(folder, tmp_path / "bundle", from_safetensors)


def test_shards(folder: Path, tensors: dict[str, Any], tmp_path: Path, from_safetensors: Path) -> None:
    save_sharded(folder, tensors)
    assert_builds_the_same(folder, tmp_path / "bundle", from_safetensors, "--parallel", 2)


def test_parameters_that_require_a_gradient(
    folder: Path, tensors: dict[str, Any], tmp_path: Path, from_safetensors: Path
) -> None:
    save(folder, {name: torch.nn.Parameter(tensor.float()) for name, tensor in tensors.items()})
    assert_builds_the_same(folder, tmp_path / "bundle", from_safetensors)


class RunsCode:
    """Creates a file if unpickled, like a malicious checkpoint."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_is_refused(
    folder: Path, tensors: dict[str, Any], tmp_path: Path, legacy: bool
) -> None:
    proof = tmp_path / "it-ran"
    save(folder, {**tensors, "x": RunsCode(proof)}, legacy=legacy)
    assert_build_refused(folder, tmp_path, "pytorch_model.bin is refused", "could run code", "safetensors")
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert proof.exists(), "the pickle was harmless: this test shows nothing"


@pytest.mark.parametrize(("legacy", "kept"), [(False, 0), (False, -30_000), (True, 100), (True, -30_000)])
def test_truncated(folder: Path, tensors: dict[str, Any], tmp_path: Path, legacy: bool, kept: int) -> None:
    save(folder, tensors, legacy=legacy)
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:kept])
    assert_build_refused(folder, tmp_path, "pytorch_model.bin")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param([torch.ones(1)], id="a list"),
        pytest.param({"model.norm.weight": [1.0]}, id="lists"),
        pytest.param({0: torch.ones(1), "model.norm.weight": torch.ones(128)}, id="a number for a name"),
        pytest.param({"model.norm.weight": torch.ones(128, device="meta")}, id="no data"),
        pytest.param({"model.norm.weight": torch.ones(128).to_sparse()}, id="sparse"),
        pytest.param({"model.norm.weight": torch.ones(128, dtype=torch.int8)}, id="integers"),
    ],
)
def test_anything_but_a_dictionary_of_dense_float_tensors(
    folder: Path, tensors: dict[str, Any], tmp_path: Path, content: Any
) -> None:
    save(folder, {**tensors, **content} if isinstance(content, dict) else content)
    assert_build_refused(folder, tmp_path, "pytorch_model.bin")

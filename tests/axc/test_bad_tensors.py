"""Tensors with a wrong name, shape or type, and invalid values: one clear error, and nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.axc.axc import assert_build_refused, assert_done, llm_build
from tests.axc.conftest import Breakable

MATRIX = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.2.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"


def replaced(folder: Path, changes: Mapping[str, torch.Tensor | None]) -> Path:
    """The checkpoint with some tensors replaced or added, or removed if the change is None."""
    path = folder / "model.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    return folder


def with_value(folder: Path, name: str, where: tuple[int, ...], value: float, dtype: torch.dtype) -> Path:
    """Writes the tensors back as `dtype` with one value replaced."""
    path = folder / "model.safetensors"
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(path).items()}
    tensors[name][where] = value
    save_file(tensors, path)
    return folder


def test_missing_tensor(checkpoint: Breakable, tmp_path: Path) -> None:
    assert_build_refused(replaced(checkpoint(), {MATRIX: None}), tmp_path, "1 tensor is missing", MATRIX)


def test_unexpected_tensor(checkpoint: Breakable, tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.q_norm.weight": torch.ones(32)}
    assert_build_refused(
        replaced(checkpoint(), extra), tmp_path, "1 tensor is not of this architecture", "is model_type right", *extra
    )


def test_more_layers_than_config_json_names(checkpoint: Breakable, tmp_path: Path) -> None:
    extra = {"model.layers.4.input_layernorm.weight": torch.ones(128)}
    expected = "not of this architecture", *extra, "does config.json name fewer layers than there are?"
    assert_build_refused(replaced(checkpoint(), extra), tmp_path, *expected)


def test_rotary_tables_of_older_checkpoints_are_ignored(checkpoint: Breakable, tmp_path: Path) -> None:
    folder = replaced(checkpoint(), {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)})
    assert_done(llm_build(folder, tmp_path / "bundle"))


@pytest.mark.parametrize("shape", [(), (0,), (127,), (128, 1)])
def test_a_norm_of_another_shape(checkpoint: Breakable, tmp_path: Path, shape: tuple[int, ...]) -> None:
    folder = replaced(checkpoint(), {NORM: torch.ones(shape)})
    assert_build_refused(folder, tmp_path, f"{NORM} has shape {list(shape)}, expected [128]")


def test_transposed_matrix(checkpoint: Breakable, tmp_path: Path) -> None:
    folder = replaced(checkpoint(), {MATRIX: torch.ones(128, 384)})
    assert_build_refused(folder, tmp_path, f"{MATRIX} has shape [128, 384], expected [384, 128]")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8, torch.float8_e4m3fn])
def test_integer_weights(checkpoint: Breakable, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = replaced(checkpoint(), {MATRIX: torch.ones(384, 128).to(dtype)})
    expected = "expected one of F32, F16, BF16, F64"
    assert_build_refused(folder, tmp_path, MATRIX, expected, "original float checkpoint")


# Values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_other_floats_build(checkpoint: Breakable, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = checkpoint()
    tensors = load_file(folder / "model.safetensors")
    assert_done(llm_build(replaced(folder, {name: t.to(dtype) for name, t in tensors.items()}), tmp_path / "bundle"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("tensor", "where", "value"),
    [(MATRIX, (383, 5), np.nan), (NORM, (127,), np.inf), (EMBEDDING, (300, 0), -np.inf)],
    ids=["matrix", "norm", "embedding"],
)
def test_nonfinite_weights(
    checkpoint: Breakable,
    tmp_path: Path,
    dtype: torch.dtype,
    tensor: str,
    where: tuple[int, ...],
    value: float,
) -> None:
    parallel = 2 if (tensor, dtype) == (MATRIX, torch.bfloat16) else 1
    folder = with_value(checkpoint(), tensor, where, value, dtype)
    words = (tensor, "model.safetensors", "not finite", str(list(where)), "get it again")
    assert_build_refused(folder, tmp_path, *words, flags=("--parallel", parallel))


@pytest.mark.parametrize(("tensor", "where"), [(MATRIX, (0, 7)), (NORM, (7,)), (EMBEDDING, (0, 7))])
def test_a_float64_beyond_float32(checkpoint: Breakable, tmp_path: Path, tensor: str, where: tuple[int, ...]) -> None:
    assert_build_refused(with_value(checkpoint(), tensor, where, 1e300, torch.float64), tmp_path, tensor)


@pytest.mark.parametrize("weight_type", ["bf16", "fp16"])
def test_a_float32_beyond_the_weight_type(checkpoint: Breakable, tmp_path: Path, weight_type: str) -> None:
    folder = with_value(checkpoint(), MATRIX, (0, 7), torch.finfo(torch.float32).max, torch.float32)
    assert_build_refused(folder, tmp_path, MATRIX, flags=("-w", weight_type))


def test_a_float32_beyond_the_embedding_table_s_bfloat16(checkpoint: Breakable, tmp_path: Path) -> None:
    folder = with_value(checkpoint(), EMBEDDING, (0, 7), torch.finfo(torch.float32).min, torch.float32)
    assert_build_refused(folder, tmp_path, EMBEDDING)


@pytest.mark.parametrize("weight_type", ["s8", "s4"])
def test_large_weights_are_quantised_without_a_warning(checkpoint: Breakable, tmp_path: Path, weight_type: str) -> None:
    folder = with_value(checkpoint(), MATRIX, (0, 7), 1e30, torch.float32)
    assert_done(llm_build(folder, tmp_path / "bundle", "-w", weight_type, "--quantizer", "rtn"))

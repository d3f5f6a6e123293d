"""Weight sources read in blocks, compared with whole weights computed by numpy; tensors they need of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from axc.checkpoints import Checkpoint
from axc.weights import Source, blocks, float32
from axc.weights.cross_check import cross_check, reads
from axc.weights.sources import Columns, Gathered, Rows, Stacked, Stored, one_plus, scaled, split
from axrun.errors import BadInput

RANDOM = np.random.default_rng(0)
TENSORS: dict[str, NDArray[Any]] = {
    "tall": RANDOM.standard_normal((6000, 64)).astype(np.float32),
    "half": RANDOM.standard_normal((3000, 64)).astype(np.float16),
    "wide": RANDOM.standard_normal((3, 1 << 17)).astype(np.float32),
    "small": RANDOM.standard_normal(64).astype(np.float32),
}
TALL, HALF, WIDE, NORM = (Stored(name, array.shape) for name, array in TENSORS.items())
ORDER = RANDOM.permutation(6000)
SPARSE = np.sort(RANDOM.choice(6000, 40, replace=False)).repeat(2)
CASES: dict[str, tuple[Source, NDArray[Any]]] = {
    "stored": (TALL, TENSORS["tall"]),
    "rows wider than a block": (WIDE, TENSORS["wide"]),
    "a vector": (NORM, TENSORS["small"]),
    "rows": (Rows(TALL, 1000, 5000), TENSORS["tall"][1000:5000]),
    "split": (split(TALL, 1000, 4999, 1)[1], TENSORS["tall"][1000:5999]),
    "stacked": (Stacked((TALL, Rows(TALL, 7, 9))), np.concatenate([TENSORS["tall"], TENSORS["tall"][7:9]])),
    "stacked of two types": (
        Stacked((HALF, TALL)),
        np.concatenate([TENSORS["half"].astype(np.float32), TENSORS["tall"]]),
    ),
    "gathered": (Gathered(TALL, ORDER), TENSORS["tall"][ORDER]),
    "gathered here and there": (Gathered(TALL, SPARSE), TENSORS["tall"][SPARSE]),
    "every second row": (Gathered(TALL, np.arange(1, 6000, 2)), TENSORS["tall"][1::2]),
    "columns": (Columns(HALF, np.arange(64)[::-1].copy()), TENSORS["half"][:, ::-1]),
    "scaled": (scaled(HALF, 0.3), TENSORS["half"].astype(np.float32) * np.float32(0.3)),
    "one plus": (one_plus(NORM), 1 + TENSORS["small"]),
    "all together": (
        scaled(Gathered(Stacked((Rows(HALF, 0, 100), HALF)), ORDER[ORDER < 3100]), 2.0),
        np.concatenate([TENSORS["half"][:100], TENSORS["half"]])[ORDER[ORDER < 3100]].astype(np.float32) * 2,
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("sources")
    save_file(TENSORS, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return Checkpoint.open(folder)


@pytest.mark.parametrize("case", CASES)
def test_blocks_add_up_to_the_weight(checkpoint: Checkpoint, case: str) -> None:
    source, expected = CASES[case]
    assert source.shape == expected.shape
    found = list(blocks(source, checkpoint))
    assert [start for start, _ in found] == np.cumsum([0, *(len(block) for _, block in found[:-1])]).tolist()
    whole = np.concatenate([block for _, block in found])
    assert whole.dtype == {"FLOAT": np.float32, "FLOAT16": np.float16}[source.dtype(checkpoint)]
    np.testing.assert_array_equal(whole, expected)
    np.testing.assert_array_equal(float32("w", source, checkpoint), expected.astype(np.float32))


def test_memory_is_bounded_by_a_block(checkpoint: Checkpoint) -> None:
    for source, expected in CASES.values():
        row = int(np.prod(expected.shape[1:]))
        assert all(block.size <= max(1 << 16, row) for _, block in blocks(source, checkpoint))


def test_a_factor_of_one_keeps_the_type(checkpoint: Checkpoint) -> None:
    assert scaled(HALF, 1.0).dtype(checkpoint) == "FLOAT16"


def test_nonfinite_weights_are_named(tmp_path: Path) -> None:
    broken = TENSORS["small"].copy()
    broken[40] = np.inf
    save_file({"small": broken}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadInput, match=r"tensor small .* not finite at \[40\]"):
        float32("w", one_plus(Rows(NORM, 8, 64)), Checkpoint.open(tmp_path))


def test_a_split_has_all_rows() -> None:
    with pytest.raises(ValueError, match="6000"):
        split(TALL, 1, 2)


def test_the_checkpoint_is_compared_with_what_sources_read(checkpoint: Checkpoint) -> None:
    sources = {case: source for case, (source, _) in CASES.items()}
    assert reads(sources) == {name: array.shape for name, array in TENSORS.items()}
    cross_check(checkpoint, sources, (), Path("config.json"))
    with pytest.raises(BadInput, match=r"tall has shape \[6000, 64\], expected \[6001, 64\]"):
        cross_check(checkpoint, {**sources, "w": Rows(Stored("tall", (6001, 64)), 0, 1)}, (), Path("config.json"))
    with pytest.raises(BadInput, match="1 tensor is missing"):
        cross_check(checkpoint, {**sources, "w": scaled(Stored("more", (1,)), 3)}, (), Path("config.json"))
    with pytest.raises(BadInput, match="1 tensor is not of this architecture: wide"):
        cross_check(checkpoint, {k: v for k, v in sources.items() if "wider" not in k}, (), Path("config.json"))

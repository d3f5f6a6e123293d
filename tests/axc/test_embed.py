"""The three embed steps give the same bytes as a build."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from axc import embed
from axc.cli import main
from axrun.errors import BadInput


def test_three_steps_give_the_bytes_of_a_build(tiny_qwen2: Path, bundle_s8: Path, tmp_path: Path) -> None:
    npy, raw, out = tmp_path / "model.embed_tokens.weight.npy", tmp_path / "raw.bin", tmp_path / "bf16.bin"
    for step, source, target in (("extract", tiny_qwen2, tmp_path), ("float32", npy, raw), ("bfloat16", raw, out)):
        assert main(["embed", step, "--input_path", str(source), "--output_path", str(target)]) == 0
    assert np.load(npy).dtype == np.float32
    assert out.read_bytes() == (bundle_s8 / embed.BFLOAT16_FILE).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([npy.name, raw.name, out.name])


@pytest.mark.parametrize("prefix", embed.PREFIXES)
def test_extract_finds_multimodal_names(prefix: str, tmp_path: Path) -> None:
    table = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float16)
    save_file({prefix + "model.embed_tokens.weight": table}, tmp_path / "model.safetensors")
    npy = embed.extract(tmp_path, tmp_path / "out")
    assert (np.load(npy) == table.astype(np.float32)).all()
    embed.float32(npy, tmp_path / "raw")
    embed.bfloat16(tmp_path / "raw", tmp_path / "bf16")
    expected = table.astype(np.float32).astype(ml_dtypes.bfloat16)
    assert (tmp_path / "bf16").read_bytes() == expected.tobytes()


def test_a_pickled_npy_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(BadInput, match="embed extract"):
        embed.float32(tmp_path / "evil.npy", tmp_path / "out")
    assert not (tmp_path / "out").exists()

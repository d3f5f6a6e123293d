"""Writes a seeded random checkpoint with a named model's real shapes, for benchmarks.

Streams bfloat16 safetensors, sharded like large checkpoints.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from axc import families
from axc.axmodel.writer import write_file
from axc.bundle import write_json
from axc.hf_folder import HF_FILES
from axc.shapes import config_json
from axc.weights.cross_check import reads
from axrun.errors import BadInput
from axrun.format.dtypes import f32_to_bf16

SHARD_BYTES = 4 << 30
BLOCK = 1 << 20


def _tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    family, read = families.read_config(config, Path("config.json"), None)
    return reads(family.weights(read))


def nbytes(model: str) -> int:
    """The size of all weights in bytes."""
    return sum(2 * int(np.prod(shape)) for shape in _tensors(config_json(model)).values())


def synth(
    model: str,
    output_path: Path,
    seed: int = 0,
    tokenizer_path: Path | None = None,
    progress: Callable[[int], object] = lambda nbytes: None,
    config: dict[str, Any] | None = None,
) -> None:
    """Writes the checkpoint; `config` replaces the named model's config.json. Raises BadInput."""
    config = config or config_json(model)
    if output_path.exists() and any(output_path.iterdir()):
        raise BadInput(f"{output_path} is not empty\nChoose another --output_path.")
    output_path.mkdir(parents=True, exist_ok=True)
    if tokenizer_path is not None:
        for name in HF_FILES:
            if name != "config.json" and (tokenizer_path / name).is_file():
                shutil.copyfile(tokenizer_path / name, output_path / name)
    shards = _shards(_tensors(config))
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{index:05d}-of-{len(shards):05d}.safetensors" for index in range(1, len(shards) + 1)]
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        write_json(output_path / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    for name, shard in zip(names, shards, strict=True):
        write_file(output_path / name, _safetensors(shard, seed, progress))
    write_json(output_path / "config.json", config)


def _shards(shapes: dict[str, tuple[int, ...]]) -> list[dict[str, tuple[int, ...]]]:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        size += 2 * int(np.prod(shape))
        if size > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 2 * int(np.prod(shape))
        shards[-1][name] = shape
    return shards


def _safetensors(
    shapes: dict[str, tuple[int, ...]], seed: int, progress: Callable[[int], object]
) -> Iterator[bytes | NDArray[Any]]:
    """The file in pieces: https://huggingface.co/docs/safetensors (length, JSON header, data)."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name, shape in shapes.items():
        random = np.random.default_rng([seed, zlib.crc32(name.encode())])
        mean = np.float32(1 if name.endswith("norm.weight") else 0)
        left = int(np.prod(shape))
        while left:
            count = min(left, BLOCK)
            piece = f32_to_bf16(random.standard_normal(count, np.float32) * np.float32(0.02) + mean)
            yield piece
            progress(piece.nbytes)
            left -= count

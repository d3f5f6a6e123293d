"""Missing, damaged and misnamed weight files: one clear error, and nothing is written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tests.axc.axc import assert_build_refused, assert_done, llm_build
from tests.axc.conftest import Breakable

DEEP = "[" * 100_000


def test_no_folder(tmp_path: Path) -> None:
    assert_build_refused(
        tmp_path / "nowhere", tmp_path, "no checkpoint folder", "nowhere", "config.json and the weights"
    )


def test_a_file_in_place_of_the_folder(checkpoint: Breakable, tmp_path: Path) -> None:
    weights = checkpoint() / "model.safetensors"
    assert_build_refused(weights, tmp_path, f"{weights} is a file, not a checkpoint folder", "or a .gguf file")


def test_a_gguf_file_of_another_name(tmp_path: Path) -> None:
    """As Ollama keeps them."""
    path = tmp_path / "sha256-4f1a"
    path.write_bytes(b"GGUF" + bytes(60))
    assert_build_refused(path, tmp_path, f"{path} is a GGUF file whose name does not end in .gguf", "Rename it")


def test_a_name_longer_than_the_system_allows(tmp_path: Path) -> None:
    assert_build_refused(tmp_path / ("a" * 300), tmp_path)


@pytest.mark.parametrize("content", ["nothing", "notes.txt"])
def test_no_weights(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    if content != "nothing":
        (folder / content).write_text("...")
    expected = (
        "model.safetensors or pytorch_model.bin",
        f"It holds {content}",
        "docs/checkpoints.md lists",
    )
    assert_build_refused(folder, tmp_path, "holds no weights", *expected)


def test_no_config(checkpoint: Breakable, tmp_path: Path) -> None:
    folder = checkpoint()
    (folder / "config.json").unlink()
    assert_build_refused(folder, tmp_path, "config.json is missing")


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_broken_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("blob-that-was-swept-away"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("replace", [replace_by_folder, replace_by_broken_link])
def test_unreadable_file(checkpoint: Breakable, tmp_path: Path, name: str, replace: Callable[[Path], None]) -> None:
    folder = checkpoint()
    replace(folder / name)
    assert_build_refused(folder, tmp_path, name)


def test_links_into_a_download_cache_build(checkpoint: Breakable, tmp_path: Path) -> None:
    folder = checkpoint()
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in list(folder.iterdir()):
        os.rename(path, blobs / path.name)
        path.symlink_to(blobs / path.name)
    assert_done(llm_build(folder, tmp_path / "bundle"))
    assert not [path for path in (tmp_path / "bundle").rglob("*") if path.is_symlink()]


# Shards


def shard(folder: Path, count: int = 3) -> list[Path]:
    """Splits the checkpoint's one file, as `save_pretrained` does for large ones."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = [folder / f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for index, file in enumerate(files):
        save_file({name: tensors[name] for name in names[index::count]}, file)
    index_file(folder, {name: files[i % count].name for i, name in enumerate(names)})
    return files


def index_file(folder: Path, weight_map: object) -> None:
    """Writes the index, and removes the single file that has precedence over it."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_build(checkpoint: Breakable, tmp_path: Path) -> None:
    folder = checkpoint()
    shard(folder)
    assert_done(llm_build(folder, tmp_path / "bundle"))


def test_missing_shard(checkpoint: Breakable, tmp_path: Path) -> None:
    folder = checkpoint()
    missing = shard(folder)[1]
    missing.unlink()
    assert_build_refused(folder, tmp_path, f"1 of 3 shards named by {folder}", missing.name, "Download")


def test_a_shard_without_its_tensors(checkpoint: Breakable, tmp_path: Path) -> None:
    folder = checkpoint()
    last = shard(folder)[-1]
    first, *others = sorted(load_file(last))
    save_file({first: load_file(last)[first]}, last)
    assert_build_refused(folder, tmp_path, f"{len(others)} tensors are missing", others[0])


def test_a_tensor_in_two_shards(checkpoint: Breakable, tmp_path: Path) -> None:
    folder = checkpoint()
    one, other, _ = shard(folder)
    twice = sorted(load_file(one))[0]
    save_file({**load_file(other), twice: load_file(one)[twice]}, other)
    assert_build_refused(folder, tmp_path, twice, one.name, other.name)


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/evil.safetensors", "a/b.safetensors", "..", ".", "", "evil.sh", 5, ["x"], None]
)
def test_an_index_may_name_only_files_beside_it(checkpoint: Breakable, tmp_path: Path, name: object) -> None:
    folder = checkpoint()
    (tmp_path / "evil.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    index_file(folder, {"model.embed_tokens.weight": name})
    assert_build_refused(folder, tmp_path, "model.safetensors.index.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', DEEP])
def test_an_invalid_index(checkpoint: Breakable, tmp_path: Path, text: str) -> None:
    folder = checkpoint()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    assert_build_refused(folder, tmp_path, "model.safetensors.index.json", "Download it again")


# Damaged safetensors


@pytest.mark.parametrize("kept", [0, 4, 100, 5_000, 100_000, -1])
def test_truncated_safetensors(checkpoint: Breakable, tmp_path: Path, kept: int) -> None:
    folder = checkpoint()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert_build_refused(folder, tmp_path, f"cannot read {path}", "truncated", "download")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(bytes(5000), id="zeros"),
        pytest.param(b"\xff" * 5000, id="ones"),
        pytest.param(np.random.default_rng(0).bytes(5000), id="noise"),
        pytest.param(b"<!DOCTYPE html><html>Access denied</html>", id="a web page"),
        pytest.param((100_000).to_bytes(8, "little") + DEEP.encode(), id="a deep header"),
    ],
)
def test_garbage_for_safetensors(checkpoint: Breakable, tmp_path: Path, data: bytes) -> None:
    folder = checkpoint()
    (folder / "model.safetensors").write_bytes(data)
    assert_build_refused(folder, tmp_path, "cannot read", "model.safetensors", "download")

"""Missing, truncated, swapped, converted or foreign files are reported with the usual cause."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from axrun.doctor.files import files
from axrun.doctor.report import Finding
from axrun.format.bundle import MANIFEST
from tests.ci import plants

L0, L1 = "qwen2_p32_l0_together.axmodel", "qwen2_p32_l1_together.axmodel"
POST, TABLE = "qwen2_post.axmodel", "model.embed_tokens.weight.bfloat16.bin"


def swap(folder: Path, *, agree: bool = False) -> None:
    one, other = (folder / name for name in (L0, L1))
    first = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(first)
    if agree:
        plants.agree(folder, L0, L1)


def flip(folder: Path, name: str = POST) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)


def crlf(folder: Path) -> None:
    path = folder / "hf" / "tokenizer_config.json"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


def pointer(folder: Path) -> None:
    (folder / L0).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 241728\n")


def linked(folder: Path) -> None:
    (folder / L0).unlink()
    (folder / L0).symlink_to(folder / L1)


def resigned(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    plants.agree(folder, name)


def described(folder: Path, **model: object) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["model"].update(model)
    (folder / MANIFEST).write_text(json.dumps(manifest))


FAULTS: dict[str, tuple[Callable[[Path], object], str, str, str]] = {
    "missing": (lambda folder: (folder / L1).unlink(), L1, "missing", "copy was cut short"),
    "renamed": (lambda folder: (folder / L1).rename(folder / "l1.axmodel"), L1, "missing", "renamed"),
    "cut short": (lambda folder: (folder / L1).write_bytes(b"x" * 99), L1, "not as built", "cut short"),
    "empty": (lambda folder: (folder / POST).write_bytes(b""), POST, "not as built", "disk was full"),
    "one bit": (flip, POST, "not as built", "damaged by a disk or a transfer"),
    "swapped": (swap, L0, f"{L0} holds the bytes of {L1}", "swapped"),
    "one over another": (lambda folder: shutil.copy(folder / L1, folder / L0), L0, "bytes of", "copied over it"),
    "line ends": (crlf, "hf/tokenizer_config.json", "not as built", "CRLF"),
    "git lfs": (pointer, L0, "not as built", "Git LFS pointer"),
    "a link": (linked, L0, "not a regular file", "links"),
    "extra": (
        lambda folder: (folder / "notes.txt").write_text(""),
        "notes.txt",
        "not part of this bundle",
        "left over",
    ),
    "swapped, signed": (lambda folder: swap(folder, agree=True), L0, "layer 0: part", "another bundle"),
    "no axmodel": (lambda folder: resigned(folder, L0, b"x" * 999), L0, "not a complete axmodel", "damaged"),
    "post as a layer": (
        lambda folder: resigned(folder, L1, (folder / POST).read_bytes()),
        L1,
        "layer 1: part",
        "another bundle",
    ),
    "no json": (lambda folder: resigned(folder, "config.json", b"{"), "config.json", "not valid JSON", "edited"),
    "short table": (lambda folder: resigned(folder, TABLE, b"x" * 256), TABLE, "embedding table", "another"),
    "other groups": (
        lambda folder: described(folder, groups=[{"tokens": 1, "history": 255}]),
        "manifest.json",
        "flag last_kv_cache_len",
        "edited",
    ),
    "other types": (
        lambda folder: described(folder, hidden_state_type="fp16"),
        "manifest.json",
        "flag hidden_state_type",
        "edited",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_reported(fault: str, copy: Path) -> None:
    plant, file, part, cause = FAULTS[fault]
    plant(copy)
    found = files(copy)
    assert isinstance(found, Finding), found
    assert (found.stage, found.file) == ("files", file)
    assert part in found.part
    assert cause in found.cause


def test_a_healthy_bundle_is_read_completely(examined: Path) -> None:
    read: list[int] = []
    found = files(examined, read.append)
    assert isinstance(found, str)
    size = sum(entry["size"] for entry in json.loads((examined / MANIFEST).read_text())["files"].values())
    assert sum(read) == size


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "[" * 100_000, '{"schema": 9}', "\x00" * 64, '{"files": {"../x": {}}}']
)
def test_an_invalid_manifest_is_a_finding(text: str, copy: Path) -> None:
    (copy / MANIFEST).write_text(text)
    assert isinstance(files(copy), Finding)

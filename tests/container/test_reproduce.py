"""Base, image and bundle built twice are equal; planted differences are located exactly."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from axrun.errors import BadInput
from axrun.format import axmodel
from ci.container import compare
from ci.container.archive import Image, settle, settle_layer, write

EPOCH = 1_700_000_000


@pytest.mark.system
def test_two_builds_are_identical(verified: subprocess.CompletedProcess[str]) -> None:
    assert verified.returncode == 0, verified.stdout + verified.stderr
    lines = verified.stdout.splitlines()
    assert sum(line.startswith("  the same: ") for line in lines) == 3
    ids = [line.split()[0] for line in lines if line.startswith("  sha256:")]
    assert ids[0] == ids[1]
    assert ids[2] == ids[3]
    assert len(ids) == 4


def layer(path: Path, files: dict[str, bytes], change: Callable[[tarfile.TarInfo], None] = lambda entry: None) -> Path:
    """A tar layer as a builder writes it, with current times and user names."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime, entry.uname, entry.gname = len(content), EPOCH + 99, "somebody", "some"
            change(entry)
            tar.addfile(entry, io.BytesIO(content))
    return path


def image(folder: Path, files: dict[str, bytes], **run: object) -> Image:
    folder.mkdir(exist_ok=True)
    return write(folder / "image.tar", "toy:latest", [layer(folder / "layer.tar", files)], run, "amd64", EPOCH)


FILES = {"./etc/motd": b"hello", "./usr/bin/tool": bytes(1000)}


def differences(tmp_path: Path, files: dict[str, bytes], **run: object) -> list[str]:
    return list(compare.images(image(tmp_path / "a", FILES).path, image(tmp_path / "b", files, **run).path))


def test_differing_bytes_files_and_fields_are_named(tmp_path: Path) -> None:
    changed = {**FILES, "./usr/bin/tool": bytes(700) + b"x" + bytes(299)}
    found = differences(tmp_path, changed)
    assert "layer 0, ./usr/bin/tool: differs from byte 700 on" in found
    assert "layer 0, ./new: only in the second" in differences(tmp_path, {**FILES, "./new": b""})
    assert "config.config.User: '(none)' and '7'" in differences(tmp_path, FILES, User="7")
    assert differences(tmp_path, FILES) == []


def test_differing_attributes_and_order_of_files_are_named(tmp_path: Path) -> None:
    def shared(entry: tarfile.TarInfo) -> None:
        entry.mode, entry.mtime = 0o4755, 7

    plain, turned = layer(tmp_path / "a.tar", FILES), layer(tmp_path / "b.tar", dict(reversed(FILES.items())))
    other = layer(tmp_path / "c.tar", FILES, shared)
    with plain.open("rb") as a, turned.open("rb") as b, other.open("rb") as c:
        assert list(compare.layers(a, b)) == ["./etc/motd: stands where the second has ./usr/bin/tool"]
        a.seek(0)
        assert next(compare.layers(a, c)) == f"./etc/motd: mode 420 and 2541, mtime {EPOCH + 99} and 7"


def test_a_normalised_image_does_not_name_its_builder(tmp_path: Path) -> None:
    first = image(tmp_path / "a", FILES, User="1000", Labels={"a": "b"})
    settled = settle(first.path, tmp_path / "settled.tar", "toy:latest", EPOCH)
    with tarfile.open(first.path) as archive, tarfile.open(settled.path) as after:
        assert archive.getnames() != after.getnames()  # layers are named by the digest of their new content
    with settled.path.open("rb") as file:
        assert b"somebody" not in file.read()
    again = settle(settled.path, tmp_path / "again.tar", "toy:latest", EPOCH)
    assert again.id == settled.id
    assert list(compare.files(settled.path, again.path, "image")) == []


def test_a_layer_keeps_links_and_owners_and_loses_devices(tmp_path: Path) -> None:
    kinds = {"./dev/null": tarfile.CHRTYPE, "./link": tarfile.SYMTYPE, "./hard": tarfile.LNKTYPE}

    def kind(entry: tarfile.TarInfo) -> None:
        entry.type = kinds.get(entry.name, tarfile.REGTYPE)
        entry.linkname = "./etc/motd" if entry.type != tarfile.REGTYPE else ""
        entry.uid, entry.size = 42, 0 if entry.type != tarfile.REGTYPE else entry.size

    source = layer(tmp_path / "a.tar", {**FILES, **dict.fromkeys(kinds, b"")}, kind)
    with source.open("rb") as file:
        settle_layer(file, tmp_path / "b.tar", EPOCH)
    with tarfile.open(tmp_path / "b.tar") as tar:
        entries = {entry.name: entry for entry in tar}
    assert list(entries) == ["etc/motd", "usr/bin/tool", "link", "hard"]
    assert entries["link"].linkname == "./etc/motd"
    assert entries["hard"].linkname == "etc/motd"
    assert {(entry.uid, entry.mtime, entry.uname) for entry in entries.values()} == {(42, EPOCH, "")}


def test_a_file_that_is_no_image_is_refused(tmp_path: Path) -> None:
    damaged = tmp_path / "image.tar"
    damaged.write_bytes(image(tmp_path / "a", FILES).path.read_bytes()[:900])
    with pytest.raises(BadInput, match="is not a saved image"):
        settle(damaged, tmp_path / "b.tar", "toy", EPOCH)


def test_a_differing_tensor_of_a_bundle_is_named(bundle_s8: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle_s8, tmp_path / "copy"))
    assert list(compare.folders(bundle_s8, copy)) == []
    path = copy / "qwen2_p32_l1_together.axmodel"
    tensor = next(t for t in axmodel.read(path).initializers.values() if t.name.endswith("q_proj.weight_scale"))
    with path.open("r+b") as file:
        file.seek(tensor.offset + 5)
        value = file.read(1)[0]
        file.seek(tensor.offset + 5)
        file.write(bytes([value ^ 0x80]))
    (copy / "post_config.json").unlink()
    (copy / "hf" / "notes").write_text("")
    assert list(compare.folders(bundle_s8, copy)) == [
        f"hf/notes: only in {copy}",
        f"post_config.json: only in {bundle_s8}",
        f"{path.name}: differs from byte {tensor.offset + 5:,} on (in {tensor.name}, its byte 5)",
    ]

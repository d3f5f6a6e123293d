"""Damaged bundles and axmodels: verify and inspect report them without a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from axrun.errors import BadInput
from axrun.format import axmodel
from tests.axc.axc import CHECK_FAILED, assert_done, assert_refused, axc, nothing_changes

LAYER = "qwen2_p32_l1_together.axmodel"


@pytest.fixture
def bundle(bundle_s8: Path, tmp_path: Path) -> Path:
    """The test's own copy."""
    return Path(shutil.copytree(bundle_s8, tmp_path / "bundle"))


def test_an_intact_bundle(bundle: Path) -> None:
    with nothing_changes(bundle):
        assert_done(axc("verify", bundle))
        assert_done(axc("inspect", bundle))
        assert json.loads(axc("verify", bundle, "--json").out)["verified"] is True
        assert json.loads(axc("inspect", bundle, "--json").out)["bundle"] == "qwen2"


# A file that is not as built


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 4
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def remove(path: Path) -> None:
    path.unlink()


def link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def swap_with_another_layer(path: Path) -> None:
    other = path.with_name(path.name.replace("l1", "l2"))
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip_a_bit, "has sha256"),
        (truncate, "bytes, expected"),
        (remove, "is missing"),
        (link, "is a link"),
        (swap_with_another_layer, "and 1 more"),
    ],
)
def test_verify_names_the_file(bundle: Path, damage: Callable[[Path], None], said: str) -> None:
    damage(bundle / LAYER)
    assert_refused(axc("verify", bundle), LAYER, said, "again", code=CHECK_FAILED)


@pytest.mark.parametrize("name", ["config.json", "hf/tokenizer.json", "model.embed_tokens.weight.bfloat16.bin"])
def test_every_file_is_compared_with_the_manifest(bundle: Path, name: str) -> None:
    flip_a_bit(bundle / name)
    assert_refused(axc("verify", bundle), name, "has sha256", code=CHECK_FAILED)


def test_an_extra_file(bundle: Path) -> None:
    (bundle / "hf" / "virus.sh").write_text("")
    assert_refused(axc("verify", bundle), "hf/virus.sh is not part of this bundle", code=CHECK_FAILED)


def test_an_extra_link_to_a_folder(bundle: Path) -> None:
    (bundle / "etc").symlink_to("/etc")
    assert_refused(axc("verify", bundle), "etc is not part of this bundle", code=CHECK_FAILED)


@pytest.mark.parametrize("path", ["nowhere", "a" * 300, "/dev/null", "."])
@pytest.mark.parametrize("verb", ["verify", "inspect"])
def test_not_a_bundle(tmp_path: Path, verb: str, path: str) -> None:
    assert_refused(axc(verb, path, cwd=tmp_path))


# The manifest

Manifest = dict[str, Any]


def name_a_file(name: str) -> Callable[[Manifest], None]:
    return lambda manifest: manifest["files"].update({name: manifest["files"]["config.json"]})


def without(*keys: str) -> Callable[[Manifest], None]:
    def change(values: Manifest) -> None:
        for key in keys[:-1]:
            values = values[key]
        del values[keys[-1]]

    return change


def with_value(value: object, *keys: str) -> Callable[[Manifest], None]:
    def change(values: Manifest) -> None:
        for key in keys[:-1]:
            values = values[key]
        values[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(name_a_file("../elsewhere"), id="a file above"),
        pytest.param(name_a_file("hf/../../elsewhere"), id="a file around a corner"),
        pytest.param(name_a_file("/etc/passwd"), id="an absolute file"),
        pytest.param(name_a_file("hf\\..\\..\\elsewhere"), id="a file above, as Windows has it"),
        pytest.param(name_a_file(""), id="a file without a name"),
        pytest.param(name_a_file("\0"), id="a null byte"),
        pytest.param(without("files"), id="no files"),
        pytest.param(with_value([], "files"), id="a list of files"),
        pytest.param(with_value(None, "files", "config.json"), id="a file without an entry"),
        pytest.param(with_value(-1, "files", "config.json", "size"), id="a negative size"),
        pytest.param(with_value("1", "files", "config.json", "size"), id="a size in words"),
        pytest.param(with_value("abc", "files", "config.json", "sha256"), id="a short sha256"),
        pytest.param(without("schema"), id="no schema"),
        pytest.param(with_value(99, "schema"), id="a schema of the future"),
        pytest.param(without("maker"), id="no maker"),
    ],
)
def test_a_damaged_manifest(bundle: Path, change: Callable[[Manifest], None]) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    for command in (["verify", bundle], ["inspect", bundle]):
        assert_refused(axc(*command), "manifest.json", "is damaged", "again")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(without("model"), id="no model"),
        pytest.param(with_value([], "model"), id="a list for the model"),
        pytest.param(without("model", "name"), id="no name"),
        pytest.param(with_value("\ud800", "model", "name"), id="half a character for a name"),
        pytest.param(without("memory"), id="no memory"),
        pytest.param(with_value("much", "memory", "axmodels"), id="memory in words"),
        pytest.param(with_value([], "tools"), id="a list of tools"),
        pytest.param(with_value(1, "tools", "axc"), id="a number for a version"),
        pytest.param(with_value("1\n2", "tools", "axc"), id="a version of two lines"),
        pytest.param(name_a_file("\ud800"), id="half a character in a file's name"),
    ],
)
def test_a_damaged_description(bundle: Path, change: Callable[[Manifest], None]) -> None:
    """The description of the model; verify only checks files and may not need it."""
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    assert_refused(axc("inspect", bundle), "manifest.json", "again")
    verified = axc("verify", bundle)
    if verified.code:
        assert_refused(verified, "again", code=verified.code)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param(without("model", "layer_file"), "model.layer_file is None", id="no layers' name"),
        pytest.param(with_value("../l%d", "model", "layer_file"), "lists no file '../l0'", id="layers elsewhere"),
        pytest.param(with_value("hf", "model", "post_file"), "lists no file 'hf'", id="a folder for a file"),
        pytest.param(with_value(5, "model", "layers"), "l4_together", id="a layer too many"),
        pytest.param(with_value(10**9, "model", "layers"), "1000000000 layers", id="too many layers"),
        pytest.param(with_value(True, "model", "layers"), "model.layers is True", id="a flag for a number"),
        pytest.param(with_value("fp8", "model", "hidden_state_type"), "'fp8'", id="an unknown type"),
        pytest.param(with_value([], "model", "groups"), "model.groups is []", id="no groups"),
        pytest.param(with_value([{"tokens": 0, "history": 0}], "model", "groups"), "group 0", id="an empty group"),
    ],
)
def test_a_manifest_that_contradicts_itself(bundle: Path, change: Callable[[Manifest], None], said: str) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    assert_refused(axc("inspect", bundle), "manifest.json", said, "again")


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '"\ufffe', "0" * 5000])
def test_an_unreadable_manifest(bundle: Path, text: str) -> None:
    (bundle / "manifest.json").write_text(text)
    assert_refused(axc("verify", bundle), "manifest.json")
    assert_refused(axc("inspect", bundle), "manifest.json")


# An axmodel


@pytest.mark.parametrize("kept", [0, 1, 100, 5_000, -1])
def test_a_truncated_axmodel(bundle: Path, kept: int) -> None:
    path = bundle / LAYER
    path.write_bytes(path.read_bytes()[:kept])
    assert_refused(axc("inspect", path), LAYER, "again")
    with pytest.raises(BadInput, match=LAYER):
        axmodel.read(path)


def changed(change: Callable[[onnx.ModelProto], object]) -> Callable[[Path], None]:
    """Rewrites the file with the onnx library, keeping the offsets of raw data if possible."""

    def apply(path: Path) -> None:
        model = onnx.load(path)
        change(model)
        path.write_bytes(model.SerializeToString())

    return apply


def with_metadata(key: str, value: str) -> Callable[[Path], None]:
    def change(model: onnx.ModelProto) -> None:
        entry = next(entry for entry in model.metadata_props if entry.key == key)
        entry.value = value

    return changed(change)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.write_bytes(b"\x00" * 5000), id="zeros"),
        pytest.param(lambda path: path.write_bytes(b"\xff" * 5000), id="ones"),
        pytest.param(lambda path: path.write_bytes(b'{"a": "JSON"}'), id="JSON"),
        pytest.param(lambda path: path.write_bytes(b"\x7fELF\x02\x01\x01"), id="ELF"),
        pytest.param(lambda path: path.write_bytes(b"\x08\x0b\x12\x03axc"), id="no graph"),
        pytest.param(changed(lambda model: model.graph.initializer[0].dims.append(2)), id="a dimension too many"),
        pytest.param(changed(lambda model: model.graph.initializer[0].dims.__setitem__(0, -1)), id="a negative one"),
        pytest.param(changed(lambda model: model.graph.initializer[0].dims.__setitem__(0, 1 << 62)), id="a huge one"),
        pytest.param(changed(lambda model: setattr(model.graph.initializer[0], "data_type", 99)), id="unknown type"),
        pytest.param(changed(lambda model: setattr(model.graph.initializer[0], "data_location", 1)), id="external"),
        pytest.param(changed(lambda model: model.graph.initializer[0].ClearField("raw_data")), id="no raw data"),
        pytest.param(
            changed(lambda model: model.graph.initializer.append(model.graph.initializer[0])), id="a name twice"
        ),
        pytest.param(changed(lambda model: setattr(model, "producer_version", "longer")), id="raw data moved"),
        pytest.param(changed(lambda model: setattr(model.opset_import[0], "version", 22)), id="another opset"),
        pytest.param(
            changed(lambda model: model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))),
            id="another domain",
        ),
        pytest.param(changed(lambda model: model.ClearField("metadata_props")), id="no metadata"),
        pytest.param(with_metadata("axmodel.version", "2"), id="another version"),
        pytest.param(with_metadata("axmodel.kind", "other"), id="another kind"),
        pytest.param(with_metadata("axmodel.layer", "one"), id="a layer in words"),
        pytest.param(with_metadata("axmodel.groups", ""), id="no groups"),
        pytest.param(with_metadata("axmodel.groups", "[]"), id="an empty list of groups"),
        pytest.param(with_metadata("axmodel.groups", "[1]"), id="groups of another type"),
        pytest.param(with_metadata("axmodel.groups", '[{"tokens": 1}]'), id="groups without history"),
        pytest.param(with_metadata("axmodel.groups", '[{"tokens": true, "history": 0}]'), id="flags for numbers"),
        pytest.param(with_metadata("axmodel.groups", "[" * 100_000), id="deep groups"),
        pytest.param(with_metadata("axmodel.groups", "9" * 5000), id="a number of 5000 digits"),
    ],
)
def test_a_damaged_axmodel(bundle: Path, damage: Callable[[Path], None]) -> None:
    path = bundle / LAYER
    damage(path)
    assert_refused(axc("inspect", path), LAYER)
    with pytest.raises(BadInput, match=LAYER):
        axmodel.read(path)

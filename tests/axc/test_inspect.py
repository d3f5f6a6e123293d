"""`axc inspect` on our axmodels, on bundles, and on files in the vendor's format."""

from __future__ import annotations

import base64
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from axc.cli import main
from axrun.cli import main as axrun
from axrun.format import wire
from tests import vendor_files


def inspect(path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    assert main(["inspect", str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", vendor_files.ROWS)
def test_every_version_of_the_vendor_s_format(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = vendor_files.ROWS[name]
    path = vendor_files.write(tmp_path, row, 1)
    seen = inspect(path, capsys)
    assert (seen["producer"], seen["version"], seen["maker"]) == ("Pulsar2", row.version, "vendor")
    assert (seen["ir_version"], seen["opset"]) == (row.ir, row.opset)
    about = seen["vendor"]
    assert (about["commit"], about["npu_mode"]) == (row.commit, "NPU2")
    assert about["chip"].startswith("AX620E" if row.ax620e else "AX650")
    assert [entry["f1"] for entry in about["extra_data"]["f1"]] == ["image", "scores"]
    assert about["extra_data"]["f3"]["f10"]["f1"] == row.code
    attributes = about["nodes"][0]["attributes"]
    assert attributes["neu_name"] == row.code
    assert attributes["npu_graph_info"]["dotneus"][0]["neu_key"] == row.code
    assert attributes["outputs_info"] == {"scores": ["FP32", [1, 1000]]}
    assert attributes["version"] == row.attribute_version
    assert [group["node"] for group in seen["groups"]] == [row.node]
    assert seen["inputs"] == [{"name": "image", "dtype": "UINT8", "shape": [1, 224, 224, 3]}]
    blobs = {tensor["name"]: (tensor["bytes"], tensor["holds"]) for tensor in seen["initializers"]}
    assert blobs.pop(row.params) == (200, "parameters")
    assert blobs.pop(row.code) == (64, "code")
    assert blobs == ({"npu_dyn_params": (9, "dynamic parameters")} if row.dyn_params else {})
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    for words in (row.commit, "NPU2", f"IR version {row.ir}", "npu_graph_info", row.params):
        assert words in text


def test_several_nodes_are_several_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As reported for the vendor's language models."""
    nodes = [helper.make_node("neu mode", ["input"], [f"output_{group}"], f"grp{group}") for group in (0, 1)]
    values = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, [1, 1, 896]) for name in ("input", "output_0")]
    model = helper.make_model(helper.make_graph(nodes, "npu", values[:1], values[1:]), producer_name="Pulsar2")
    path = tmp_path / "groups.axmodel"
    onnx.save(model, path)
    seen = inspect(path, capsys)
    assert [group["node"] for group in seen["groups"]] == ["grp0", "grp1"]
    assert seen["vendor"]["npu_mode"] is None


@pytest.mark.parametrize(("mode", "name"), [(0, "NPU1"), (1, "NPU2"), (2, "NPU3"), (7, "unknown (7)")])
def test_the_npu_mode(mode: int, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(vendor_files.write(tmp_path, vendor_files.ROWS["4.1"], mode), capsys)["vendor"]["npu_mode"] == name


def nested(depth: int) -> bytes:
    body = b"\x08\x01"
    for _ in range(depth):
        body = b"\x0a" + wire.varint(len(body)) + body
    return body


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ("!!!!", "not base64"),
        ("QUJ", "not base64"),
        (encoded(b"\x0a\x7fabc"), "127 bytes where 3 are left"),
        (encoded(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7fabc"), "bytes where 3 are left"),
        (encoded(b"\x0f\x01"), "wire type 7"),
        (encoded(b"\x08\x01" * 5000), "more than 4096 fields"),
        ("A" * (1 << 20) + "AAAA", "are read"),
    ],
)
def test_wrong_metadata(metadata: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "odd.axmodel"
    path.write_bytes(vendor_files.encode(vendor_files.ROWS["4.1"], metadata))
    about = inspect(path, capsys)["vendor"]
    assert about["extra_data"].startswith("not decoded: ")
    assert words in about["extra_data"]
    assert about["npu_mode"] is None


def test_deeply_nested_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "deep.axmodel"
    path.write_bytes(vendor_files.encode(vendor_files.ROWS["4.1"], encoded(nested(300))))
    assert len(json.dumps(inspect(path, capsys)["vendor"]["extra_data"])) < 1000


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 50_000 + "1" + "}" * 50_000, "{not json", "[" * 900 + "]" * 900]
)
def test_invalid_json_in_attributes(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = onnx.load_from_string(vendor_files.encode(vendor_files.ROWS["3.1"], ""))
    (attribute,) = (entry for entry in model.graph.node[0].attribute if entry.name == "npu_graph_info")
    attribute.s = text.encode()
    path = tmp_path / "deep.axmodel"
    onnx.save(model, path)
    seen = inspect(path, capsys)["vendor"]["nodes"][0]["attributes"]["npu_graph_info"]
    assert len(json.dumps(seen)) < 5000
    assert main(["inspect", str(path)]) == 0


def test_flipped_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    good = vendor_files.encode(vendor_files.ROWS["3.3"], vendor_files.extra_data(vendor_files.ROWS["3.3"], 2))
    path = tmp_path / "flipped.axmodel"
    ends = set()
    for _ in range(300):
        data = bytearray(good)
        for at in random.integers(0, len(data), random.integers(1, 5)):
            data[at] = random.integers(0, 256)
        path.write_bytes(data[: random.integers(len(data) // 2, len(data) + 1)] if random.random() < 0.2 else data)
        ends.add(main(["inspect", str(path)]))
        assert len(capsys.readouterr().err.splitlines()) <= 3
    assert ends == {0, 2}


def test_control_characters_of_a_file_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = dataclasses.replace(vendor_files.ROWS["4.1"], commit="a\x1b[2Jb")
    assert main(["inspect", str(vendor_files.write(tmp_path, row))]) == 0
    assert "a\\x1b[2Jb" in capsys.readouterr().out


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 12345678\n".format("0" * 64)


@pytest.mark.parametrize("command", ["axc inspect", "axrun model"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (POINTER.encode(), [f"is a Git LFS pointer of {len(POINTER)} bytes", "12,345,678 bytes", "git lfs pull"]),
        (b"\xde\xad\xbe\xef" + bytes(range(256)), ["is an encrypted model", "DE AD BE EF"]),
    ],
)
def test_other_files_with_the_extension(
    command: str, content: bytes, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.axmodel"
    path.write_bytes(content)
    program, verb = command.split()
    assert {"axc": main, "axrun": axrun}[program]([verb, str(path)]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words)
    assert len(error.splitlines()) <= 3


def test_our_axmodels_are_described_like_onnx_reads_them(bundle_s8: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = bundle_s8 / "qwen2_p32_l0_together.axmodel"
    assert main(["inspect", str(path), "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    model = onnx.load(path)
    assert [info["name"] for info in seen["inputs"]] == [info.name for info in model.graph.input]
    assert seen["metadata"] == {entry.key: entry.value for entry in model.metadata_props}
    assert {tensor["name"]: tensor["bytes"] for tensor in seen["initializers"]} == {
        tensor.name: len(tensor.raw_data) for tensor in model.graph.initializer
    }
    assert seen["operators"]["Attention"] == 1
    assert [group["history"] for group in seen["groups"]] == [255, 0, 32, 128]


def test_a_bundle(bundle_s8: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundle_s8), "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["model"]["layers"] == 4
    assert set(seen["files"]) == {path.relative_to(bundle_s8).as_posix() for path in bundle_s8.rglob("*.*")} - {
        "manifest.json"
    }
    assert main(["inspect", str(bundle_s8)]) == 0
    assert "qwen2_post.axmodel" in capsys.readouterr().out


def test_other_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("hello")
    assert main(["inspect", str(tmp_path / "text")]) == 2
    assert "not a whole axmodel" in capsys.readouterr().err

"""`axc inspect` on our axmodels, on bundles, and on one shaped as the vendor's are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from toolchain.cli import main


@pytest.fixture
def vendor_axmodel(tmp_path: Path) -> Path:
    """An ONNX container as the vendor's: producer Pulsar2, a `neu mode` node for each group, NPU blobs inside."""
    blobs = [
        numpy_helper.from_array(np.arange(n, dtype=np.uint8), name) for name, n in (("npu_params", 200), ("g0", 16))
    ]
    nodes = [
        helper.make_node("neu mode", ["input", "npu_params"], [f"output_{group}"], f"grp{group}") for group in (0, 1)
    ]
    inputs = [helper.make_tensor_value_info("input", TensorProto.BFLOAT16, [1, 1, 896])]
    outputs = [helper.make_tensor_value_info(f"output_{group}", TensorProto.BFLOAT16, [1, 1, 896]) for group in (0, 1)]
    graph = helper.make_graph(nodes, "npu", inputs, outputs, blobs)
    model = helper.make_model(graph, producer_name="Pulsar2", producer_version="3.2-patch1 2b3a4680")
    path = tmp_path / "vendor.axmodel"
    onnx.save(model, path)
    return path


def test_vendor(vendor_axmodel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(vendor_axmodel), "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert (seen["producer"], seen["version"]) == ("Pulsar2", "3.2-patch1 2b3a4680")
    assert [group["node"] for group in seen["groups"]] == ["grp0", "grp1"]
    assert seen["inputs"] == [{"name": "input", "dtype": "BFLOAT16", "shape": [1, 1, 896]}]
    assert {tensor["name"]: tensor["bytes"] for tensor in seen["initializers"]} == {"npu_params": 200, "g0": 16}
    assert main(["inspect", str(vendor_axmodel)]) == 0
    assert "npu_params" in capsys.readouterr().out


def test_ours_says_what_onnx_says(bundle_s8: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_what_is_no_axmodel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("hello")
    assert main(["inspect", str(tmp_path / "text")]) == 2
    assert "not a whole axmodel" in capsys.readouterr().err

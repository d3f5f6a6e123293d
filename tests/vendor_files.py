"""Files like those of the vendor's compiler, built with onnx after public examples.

One row per version: the layout of its ModelProto. The NPU code is closed and replaced by arbitrary bytes.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


@dataclass(frozen=True)
class Row:
    """`node`: name of the only node; `code`, `params`: its blobs; `inside`: whether they are inputs of the node too."""

    version: str
    commit: str
    ir: int
    opset: int
    node: str
    code: str
    params: str
    attribute_version: int
    inside: bool = False
    dyn_params: bool = False
    ax620e: bool = False


ROWS = {
    "1.1": Row("1.1-beta1", "9ab0dbb4", 6, 11, "npu_0", "npu_0_data", "npu_params", 1, inside=True),
    "1.7": Row("1.7", "0ca05ee9", 7, 13, "npu_0", "npu_0_dot_neu", "npu_0_params", 0, inside=True),
    "1.8": Row("1.8-beta1", "3a2d39e2-dirty", 7, 13, "npu_0", "npu_0_b1_data", "npu_0_params", 1),
    "1.9": Row("1.9", "cb88db88", 7, 13, "npu_0", "npu_0_b1_data", "npu_0_params", 1),
    "3.1": Row("3.1", "f7bfb71f", 8, 16, "subgraph_npu_0", "subgraph_npu_0_b1_neu", "npu_0_params", 1),
    "3.3": Row("3.3", "ae03a08f", 8, 16, "subgraph_npu_0", "subgraph_npu_0_b1_neu", "npu_0_params", 1, dyn_params=True),
    "4.1": Row("4.1-patch1", "c30dcbfa", 10, 18, "subgraph_npu_0", "subgraph_npu_0_b1_neu", "npu_params", 1),
    "AX620E": Row("3.3", "3cdead5e", 8, 16, "subgraph_npu_0", "subgraph_npu_0_b1_neu", "npu_params", 1, ax620e=True),
}


def write(folder: Path, row: Row, npu: int = 0) -> Path:
    """An axmodel for `npu` + 1 cores of the NPU."""
    path = folder / f"{row.version}-npu{npu + 1}{'-ax620e' * row.ax620e}.axmodel"
    path.write_bytes(encode(row, extra_data(row, npu)))
    return path


def encode(row: Row, metadata: str) -> bytes:
    """The bytes of an axmodel whose metadata entry extra_data is `metadata`."""
    blobs = {row.params: np.arange(200, dtype=np.uint8), row.code: np.arange(64, dtype=np.uint8)}
    if row.dyn_params:
        blobs["npu_dyn_params"] = np.frombuffer(b"R.stride0", np.uint8)
    info = {
        "name": row.node,
        "dotneus": [
            {"neu_key": row.code, "batch": 1, "extra_inputs": [{"name": "params", "const_data_key": "npu_params"}]}
        ],
    }
    node = helper.make_node(
        "neu mode",
        ["image", *(blobs if row.inside else ())],
        ["scores"],
        row.node,
        neu_name=row.code,
        npu_graph_info=json.dumps(info),
        outputs_info=json.dumps({"scores": ["FP32", [1, 1000]]}),
        version=row.attribute_version,
    )
    graph = helper.make_graph(
        [node],
        "ax-model",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [1, 224, 224, 3])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 1000])],
        [numpy_helper.from_array(data, name) for name, data in blobs.items()],
    )
    model = helper.make_model(
        graph,
        producer_name="Pulsar2",
        doc_string=f"Pulsar2 Version:  {row.version}\nPulsar2 Commit: {row.commit}",
        opset_imports=[helper.make_opsetid("", row.opset)],
        ir_version=row.ir,
    )
    helper.set_model_props(model, {"extra_data": metadata})
    assert isinstance(model, onnx.ModelProto)
    return bytes(model.SerializeToString())


def extra_data(row: Row, npu: int) -> str:
    """f1 tensors, f2 "1", f3 the node and its code, f4.f3 the NPU mode, f5 the AX620E."""
    code = field(10, field(1, row.code) + field(2, 1) + field(3, b"\x01\x02\xff"))
    message = field(1, field(1, "image")) + field(1, field(1, "scores")) + field(2, "1")
    message += field(3, field(1, row.node) + code)
    message += field(4, field(3, npu) if npu else field(1, "AX"))
    if row.ax620e:
        message += field(5, 1)
    return base64.b64encode(message).decode()


def field(number: int, value: str | bytes | int) -> bytes:
    """One protobuf field with a number below 16, of less than 128 bytes or below 128."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    body = value.encode() if isinstance(value, str) else value
    assert len(body) < 128
    return bytes([number << 3 | 2, len(body)]) + body

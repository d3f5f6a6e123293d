"""Damages axmodels with the onnx package, which shares no code with our writer, and updates the manifest."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

ALIGNMENT = 64  # of raw_data, as docs/axmodel.md asks
GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9  # field numbers of onnx.proto3
CARRIERS: dict[int, Any] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.BFLOAT16: np.uint16,
    TensorProto.INT8: np.int8,
    TensorProto.INT4: np.uint8,  # two values per byte, flat
    TensorProto.INT64: np.int64,
}
Change = Callable[[onnx.ModelProto], None]


def edit(bundle: Path, name: str, change: Change) -> None:
    """Changes one axmodel of a bundle, and updates the manifest."""
    model = onnx.load(bundle / name)
    change(model)
    replace(bundle, name, aligned(model))


def replace(bundle: Path, name: str, content: bytes) -> None:
    """Replaces the content of a file that may be a hard link, and updates the manifest."""
    rewrite(bundle / name, content)
    sign(bundle, name)


def rewrite(path: Path, content: bytes) -> None:
    """Replaces the content of a file, without updating the manifest."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def sign(bundle: Path, *names: str) -> None:
    """Adds files to the manifest, or updates their entries."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    for name in names:
        content = (bundle / name).read_bytes()
        manifest["files"][name] = {"sha256": sha256(content).hexdigest(), "size": len(content)}
    rewrite(bundle / "manifest.json", json.dumps(manifest).encode())


def manifest(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads((bundle / "manifest.json").read_text())
    change(values)
    rewrite(bundle / "manifest.json", json.dumps(values).encode())


def layer(bundle: Path, index: int) -> str:
    """The file name of a layer."""
    return str(json.loads((bundle / "manifest.json").read_text())["model"]["layer_file"]).replace("%d", str(index))


def post(bundle: Path) -> str:
    return str(json.loads((bundle / "manifest.json").read_text())["model"]["post_file"])


def initializer(model: onnx.ModelProto, ending: str) -> onnx.TensorProto:
    """The initializer whose name ends with `name`."""
    found: list[onnx.TensorProto] = [each for each in model.graph.initializer if each.name.endswith(ending)]
    assert len(found) == 1
    return found[0]


def get(model: onnx.ModelProto, ending: str) -> Any:
    """A copy of its values: bfloat16 as uint16, 4-bit values as flat bytes."""
    tensor = initializer(model, ending)
    flat = np.frombuffer(tensor.raw_data, CARRIERS[tensor.data_type]).copy()
    return flat if tensor.data_type == TensorProto.INT4 else flat.reshape(tuple(tensor.dims))


def put(model: onnx.ModelProto, ending: str, values: Any) -> None:
    """Replaces the values, also by some of another shape."""
    tensor = initializer(model, ending)
    if tensor.data_type != TensorProto.INT4:
        tensor.dims[:] = values.shape
    tensor.raw_data = np.ascontiguousarray(values, CARRIERS[tensor.data_type]).tobytes()


def node(model: onnx.ModelProto, kind: str, index: int = 0) -> onnx.NodeProto:
    """The index-th node of an operator."""
    found: list[onnx.NodeProto] = [entry for entry in model.graph.node if entry.op_type == kind]
    return found[index]


def attribute(target: onnx.NodeProto, name: str, value: float) -> None:
    kept = [entry for entry in target.attribute if entry.name != name]
    del target.attribute[:]
    target.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])


def metadata(model: onnx.ModelProto, **changes: str) -> None:
    """Entries "axmodel.<name>"."""
    values = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, {**values, **{f"axmodel.{key}": value for key, value in changes.items()}})


def aligned(model: onnx.ModelProto) -> bytes:
    """The bytes of a model with all raw_data aligned to ALIGNMENT; doc_strings are the padding."""
    before = [model.graph.node[-1], *model.graph.initializer[:-1]]
    for entry in before:
        entry.doc_string = " "
    for _ in range(8 * len(before) + 8):
        content = bytes(model.SerializeToString())
        wrong = next((i for i, at in enumerate(raw_offsets(content)) if at % ALIGNMENT), None)
        if wrong is None:
            return content
        offset = list(raw_offsets(content))[wrong]
        before[wrong].doc_string += " " * (-offset % ALIGNMENT)
    raise AssertionError("no alignment found")


def raw_offsets(content: bytes) -> Iterator[int]:
    """Where the raw_data of each initializer begins."""
    for number, start, stop in _fields(content, 0, len(content)):
        if number == GRAPH:
            for inner, begin, end in _fields(content, start, stop):
                if inner == INITIALIZER:
                    yield from (at for field, at, _ in _fields(content, begin, end) if field == RAW_DATA)


def _fields(content: bytes, at: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, stop) of the length-delimited fields of a message."""
    while at < stop:
        key, at = _varint(content, at)
        if key & 7 == 2:
            length, at = _varint(content, at)
            yield key >> 3, at, at + length
            at += length
        elif key & 7 == 0:
            _, at = _varint(content, at)
        else:
            at += 4 if key & 7 == 5 else 8


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at

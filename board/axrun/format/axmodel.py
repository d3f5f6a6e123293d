"""Axmodels: a zero-copy reader of ONNX ModelProto files, and the byte layout for writing them.

docs/axmodel.md is the specification. The reader also opens the vendor's axmodels: the container is the same, but the
content (one `neu mode` node per group, NPU blobs as initializers) is closed.
"""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Union

import numpy as np
from numpy.typing import NDArray

from axrun.errors import BadInput
from axrun.format import wire
from axrun.format.dtypes import DTYPES, NAMES, nbytes

PRODUCER = "axc"
VENDOR = "Pulsar2"
FORMAT_VERSION = 1
IR_VERSION = 11  # the first that knows opset 23
OPSET = 23  # the first with Attention, RMSNormalization and RotaryEmbedding
ALIGNMENT = 64  # of every raw_data in the file: a cache line, and the widest vector load
MAX_BYTES = (1 << 31) - 1  # the largest message that protobuf reads
BLOCKED = -65536.0  # value of the additive mask for a masked column; 0 for a visible one

Attribute = Union[int, float, str, tuple[int, ...], tuple[float, ...], wire.Span]


@dataclass(frozen=True)
class Group:
    """A shape group: `tokens` input rows after `history` cached rows (0: the group has no cache input)."""

    index: int
    tokens: int
    history: int


@dataclass(frozen=True)
class TensorInfo:
    """An input or output; a dimension is a number, or a name whose value depends on the group."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Tensor:
    """An initializer. `offset` is the file offset of its `nbytes` of raw data (-1: not stored as raw data)."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    offset: int
    nbytes: int
    raw: memoryview | None = field(default=None, repr=False, compare=False)

    def array(self) -> NDArray[Any]:
        """A view of the data: shape `dims`, or flat bytes for 4-bit types (two values per byte)."""
        if self.raw is None:
            raise BadInput(f"initializer {self.name} is not stored as raw data")
        flat = np.frombuffer(self.raw, DTYPES[self.dtype].numpy)
        return flat if DTYPES[self.dtype].bits < 8 else flat.reshape(self.dims)


@dataclass(frozen=True)
class Node:
    """An operator with the names of its inputs and outputs."""

    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    name: str = ""
    domain: str = ""


@dataclass(frozen=True)
class Axmodel:
    """One axmodel file; `buffer` is its memory map, which holds the data of the tensors."""

    producer_name: str
    producer_version: str
    opset: int
    metadata: Mapping[str, str]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    nodes: tuple[Node, ...]
    initializers: Mapping[str, Tensor]
    name: str = ""
    groups: tuple[Group, ...] = ()
    nbytes: int = 0
    ir_version: int = 0
    doc_string: str = ""

    @property
    def ours(self) -> bool:
        """Whether the content is open (ours), not the vendor's."""
        return self.producer_name == PRODUCER

    @property
    def vendors(self) -> bool:
        """Whether it is code for an NPU, made by the vendor's compiler."""
        return self.producer_name == VENDOR

    @property
    def version(self) -> str:
        """Version of the compiler; the vendor's is in the doc_string."""
        found = re.search(rf"{VENDOR} Version: *(\S.{{0,60}})", self.doc_string) if self.vendors else None
        return found[1].strip() if found else self.producer_version

    @property
    def commit(self) -> str:
        """Commit of the vendor's compiler; empty for any other."""
        found = re.search(rf"{VENDOR} Commit: *(\S.{{0,60}})", self.doc_string) if self.vendors else None
        return found[1].strip() if found else ""

    @property
    def kind(self) -> str:
        """`layer` or `post`; empty for the vendor's."""
        return self.metadata.get("axmodel.kind", "")

    @property
    def layer(self) -> int:
        """The index of a layer's axmodel; -1 for any other."""
        return int(self.metadata.get("axmodel.layer", "-1"))

    @property
    def caches(self) -> bool:
        """Whether this layer keeps K and V; one that does not has no tensors but `input` and `output`."""
        return self.metadata.get("axmodel.keeps") != "nothing"

    @property
    def window(self) -> int:
        """The attention window of this layer in tokens, including the token itself; 0: unlimited."""
        return int(self.metadata.get("axmodel.window", "0"))

    @property
    def part(self) -> str:
        """The part of the model: `layer 3`, `post`; empty for the vendor's."""
        return f"layer {self.metadata.get('axmodel.layer', '?')[:12]}" if self.kind == "layer" else self.kind


def read(path: str | os.PathLike[str]) -> Axmodel:
    """Opens an axmodel by memory map, without reading the weights.

    Raises BadInput if it cannot be opened, is truncated, is not a ModelProto, or is ours and violates the format.
    """
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise BadInput(f"cannot open axmodel {name}: {error.strerror or error}") from None
    except ValueError:
        raise BadInput(f"{name} is empty, not an axmodel; build or copy it again") from None
    _refuse_stand_ins(name, mapped)
    try:
        return parse(memoryview(mapped))
    except (wire.WireError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(
            f"{name} is not a whole axmodel: {error}\nIt may be truncated or damaged; build it or copy it again."
        ) from None


LFS_POINTER = b"version https://git-lfs"  # https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
ENCRYPTED = b"\xde\xad\xbe\xef"


def _refuse_stand_ins(name: str, content: mmap.mmap) -> None:
    """Raises BadInput for files that have the extension but are not axmodels."""
    head = content[:512]
    if head.startswith(LFS_POINTER):
        size = re.search(rb"\nsize (\d{1,18})\r?\n", head)
        stored = f" of {int(size[1]):,} bytes" if size else ""
        raise BadInput(
            f"{name} is a Git LFS pointer of {len(content):,} bytes, not the file{stored} it stands for\n"
            "Fetch that in its repository: git lfs install && git lfs pull"
        )
    if head.startswith(ENCRYPTED):
        raise BadInput(
            f"{name} is an encrypted model (it begins with DE AD BE EF, as the vendor's image processing models do)\n"
            "Only the vendor's own libraries on a board read it; an axmodel of a language model is not encrypted."
        )


def parse(buffer: memoryview) -> Axmodel:
    """Parses the bytes of an axmodel. Raises WireError or ValueError with the reason."""
    model = wire.decode(buffer, "Model", 0, len(buffer))
    if "graph" not in model:
        raise ValueError("it holds no graph")
    graph = model["graph"]
    tensors = [_tensor(buffer, message) for message in graph["initializer"]]
    opsets = {entry.get("domain", ""): entry.get("version", 0) for entry in model["opset_import"]}
    axmodel = Axmodel(
        producer_name=model.get("producer_name", ""),
        producer_version=model.get("producer_version", ""),
        opset=opsets.get("", 0),
        metadata={entry.get("key", ""): entry.get("value", "") for entry in model["metadata_props"]},
        inputs=tuple(_tensor_info(message) for message in graph["input"]),
        outputs=tuple(_tensor_info(message) for message in graph["output"]),
        nodes=tuple(_node(buffer, message) for message in graph["node"]),
        initializers={tensor.name: tensor for tensor in tensors},
        name=graph.get("name", ""),
        nbytes=len(buffer),
        ir_version=model.get("ir_version", 0),
        doc_string=model.get("doc_string", ""),
    )
    if not axmodel.ours:
        return axmodel
    groups = _groups(axmodel.metadata.get("axmodel.groups", ""))
    _check_ours(axmodel, len(tensors), set(opsets))
    return Axmodel(**{**axmodel.__dict__, "groups": groups})


def _groups(text: str) -> tuple[Group, ...]:
    listed = json.loads(text)
    if not isinstance(listed, list) or not 1 <= len(listed) <= 1024:
        raise ValueError("metadata axmodel.groups is not a list of shape groups")
    groups = tuple(Group(index, entry["tokens"], entry["history"]) for index, entry in enumerate(listed))
    for group in groups:
        if not all(isinstance(n, int) and 0 <= n < 1 << 24 for n in (group.tokens, group.history)) or not group.tokens:
            raise ValueError(f"metadata axmodel.groups has {listed[group.index]} as group {group.index}")
    return groups


def _check_ours(axmodel: Axmodel, tensors: int, domains: set[str]) -> None:
    version = axmodel.metadata.get("axmodel.version")
    if version != str(FORMAT_VERSION):
        raise ValueError(f"it has axmodel format version {version}, this reader knows {FORMAT_VERSION}")
    if axmodel.opset != OPSET or domains != {""}:
        raise ValueError(f"it has opset {axmodel.opset} and domains {sorted(domains)}, expected {OPSET} and ['']")
    if axmodel.kind not in ("layer", "post"):
        raise ValueError(f"metadata axmodel.kind is {axmodel.kind!r}, expected layer or post")
    window = axmodel.metadata.get("axmodel.window", "1")
    if not re.fullmatch("[1-9][0-9]{0,7}", window):
        raise ValueError(f"metadata axmodel.window is {window!r:.60}, expected a number of tokens")
    keeps = axmodel.metadata.get("axmodel.keeps", "nothing")
    if keeps != "nothing" or (axmodel.kind != "layer" and "axmodel.keeps" in axmodel.metadata):
        raise ValueError(f"metadata axmodel.keeps of a {axmodel.kind} is {keeps!r:.60}, expected nothing, of a layer")
    if axmodel.kind == "layer":
        names = {info.name for info in axmodel.inputs}
        if not axmodel.caches and names != {"input"}:
            raise ValueError(f"it keeps nothing between tokens, and has the inputs {', '.join(sorted(names))}")
    if len(axmodel.initializers) != tensors:
        raise ValueError("two initializers share a name")
    for tensor in axmodel.initializers.values():
        expected = nbytes(tensor.dtype, tensor.dims)
        if tensor.nbytes != expected:
            raise ValueError(f"initializer {tensor.name} has {tensor.nbytes} bytes of raw data, expected {expected}")
        if tensor.offset % ALIGNMENT:
            raise ValueError(f"initializer {tensor.name} begins at {tensor.offset}, not a multiple of {ALIGNMENT}")


def _tensor(buffer: memoryview, message: wire.Message) -> Tensor:
    dims = tuple(message["dims"])
    if any(dim < 0 for dim in dims):
        raise ValueError(f"initializer {message.get('name')} has dimensions {dims}")
    span = message.get("raw_data")
    if span is None:
        typed = 4 * (len(message["float_data"]) + len(message["int32_data"])) + 8 * len(message["int64_data"])
        return Tensor(message.get("name", ""), _dtype(message.get("data_type", 0)), dims, -1, typed)
    raw = buffer[span.start : span.stop]
    return Tensor(message.get("name", ""), _dtype(message.get("data_type", 0)), dims, span.start, len(raw), raw)


def _dtype(number: int) -> str:
    return NAMES.get(number, f"type {number}")


def _tensor_info(message: wire.Message) -> TensorInfo:
    tensor_type = message.get("type", {}).get("tensor_type", {})
    dims = tensor_type.get("shape", {"dim": []})["dim"]
    shape = tuple(dim.get("dim_value", dim.get("dim_param", "?")) for dim in dims)
    return TensorInfo(message.get("name", ""), _dtype(tensor_type.get("elem_type", 0)), shape)


def _node(buffer: memoryview, message: wire.Message) -> Node:
    return Node(
        op_type=message.get("op_type", ""),
        inputs=tuple(message["input"]),
        outputs=tuple(message["output"]),
        attributes={entry.get("name", ""): _attribute(buffer, entry) for entry in message["attribute"]},
        name=message.get("name", ""),
        domain=message.get("domain", ""),
    )


# AttributeProto.AttributeType
ATTRIBUTE_FLOAT, ATTRIBUTE_INT, ATTRIBUTE_STRING, ATTRIBUTE_FLOATS, ATTRIBUTE_INTS = 1, 2, 3, 6, 7


def _attribute(buffer: memoryview, message: wire.Message) -> Attribute:
    kind = message.get("type", 0)
    if kind == ATTRIBUTE_FLOAT:
        return float(message.get("f", 0.0))
    if kind == ATTRIBUTE_INT:
        return int(message.get("i", 0))
    if kind == ATTRIBUTE_STRING and "s" in message:
        span = message["s"]
        return bytes(buffer[span.start : span.stop]).decode("utf-8", "replace")
    if kind == ATTRIBUTE_FLOATS:
        return tuple(message["floats"])
    if kind == ATTRIBUTE_INTS:
        return tuple(message["ints"])
    return wire.Span(0, 0)  # a tensor or a graph: our axmodels have none, and inspection does not need it


@dataclass(frozen=True)
class Slot:
    """The place of an initializer's raw data in the output file."""

    tensor: Tensor
    offset: int


def layout(model: Axmodel) -> Iterator[bytes | Slot]:
    """The contents of the file of `model` in order: literal bytes, and slots for the raw data of initializers.

    `offset` and `raw` of the tensors are ignored. Every slot is aligned to ALIGNMENT: a doc_string of spaces before
    raw_data serves as padding. Raises BadInput above protobuf's limit of 2 GiB.
    """
    head = wire.encode(
        "Model",
        {
            "ir_version": IR_VERSION,
            "producer_name": model.producer_name,
            "producer_version": model.producer_version,
            "opset_import": _opsets(model),
            "metadata_props": [{"key": key, "value": model.metadata[key]} for key in sorted(model.metadata)],
        },
    ) + wire.tag("Model", "graph")
    nodes = wire.encode(
        "Graph",
        {
            "node": [encode_node(node) for node in model.nodes],
            "name": model.name,
            "input": [encode_info(info) for info in model.inputs],
            "output": [encode_info(info) for info in model.outputs],
        },
    )
    tensors = list(model.initializers.values())
    for width in range(1, 11):  # bytes of the graph's length field: offsets and therefore padding depend on it
        parts = _place(tensors, len(head) + width + len(nodes))
        length = len(nodes) + sum(len(part) if isinstance(part, bytes) else part.tensor.nbytes for part in parts)
        if len(wire.varint(length)) == width:
            break
    if len(head) + width + length > MAX_BYTES:
        raise BadInput(
            f"{model.name} would take {length:,} bytes; ONNX files have at most {MAX_BYTES:,}\n"
            "Choose a smaller type: -w s8 for layers, --post_weight_type s8 or bf16 for the post model."
        )
    yield head + wire.varint(length) + nodes
    yield from parts


def encode(model: Axmodel) -> bytes:
    """The complete file in memory, with the data in `raw` of the initializers."""
    return b"".join(part if isinstance(part, bytes) else bytes(part.tensor.raw or b"") for part in layout(model))


def _opsets(model: Axmodel) -> list[wire.Message]:
    other = sorted({node.domain for node in model.nodes} - {""})
    return [{"domain": "", "version": model.opset}] + [{"domain": domain, "version": 1} for domain in other]


def _place(tensors: Sequence[Tensor], at: int) -> list[bytes | Slot]:
    """Initializer fields starting at file position `at`."""
    key, data = wire.tag("Graph", "initializer"), wire.tag("Tensor", "raw_data")
    parts: list[bytes | Slot] = []
    for tensor in tensors:
        fields = {"dims": tensor.dims, "data_type": DTYPES[tensor.dtype].onnx, "name": tensor.name}
        raw = data + wire.varint(tensor.nbytes)
        spaces = 0
        while True:
            body = wire.encode("Tensor", fields) + raw
            prefix = key + wire.varint(len(body) + tensor.nbytes) + body
            gap = -(at + len(prefix)) % ALIGNMENT
            if not gap:
                break
            spaces += (
                gap if "doc_string" in fields else (gap - 2) % ALIGNMENT
            )  # tag and length of the field take two bytes
            fields["doc_string"] = " " * spaces
        at += len(prefix)
        parts += [prefix, Slot(tensor, at)]
        at += tensor.nbytes
    return parts


def encode_info(info: TensorInfo) -> wire.Message:
    """The ValueInfoProto fields of an input or output."""
    dims = [{"dim_param": dim} if isinstance(dim, str) else {"dim_value": dim} for dim in info.shape]
    tensor_type = {"elem_type": DTYPES[info.dtype].onnx, "shape": {"dim": dims}}
    return {"name": info.name, "type": {"tensor_type": tensor_type}}


def encode_node(node: Node) -> wire.Message:
    """The NodeProto fields of an operator."""
    attributes = []
    for name in sorted(node.attributes):
        value = node.attributes[name]
        if isinstance(value, float):
            attributes.append({"name": name, "type": ATTRIBUTE_FLOAT, "f": value})
        elif isinstance(value, int):
            attributes.append({"name": name, "type": ATTRIBUTE_INT, "i": value})
        elif isinstance(value, str):
            attributes.append({"name": name, "type": ATTRIBUTE_STRING, "s": value.encode()})
        else:
            attributes.append({"name": name, "type": ATTRIBUTE_INTS, "ints": list(value)})
    message = {"input": node.inputs, "output": node.outputs, "op_type": node.op_type, "attribute": attributes}
    return {**message, **({"name": node.name} if node.name else {}), **({"domain": node.domain} if node.domain else {})}

"""The part of ONNX's protobuf schema that axmodels use, and a bounds-checked reader and writer of its wire format.

Written here because no protobuf library can map a tensor without a copy, or lets a writer align its bytes.
Format: https://protobuf.dev/programming-guides/encoding ; fields: onnx.proto of ONNX 1.19, which defines opset 23.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple, Union

Message = dict[str, Any]


class Span(NamedTuple):
    """The range of a bytes field in the input buffer, which is not copied."""

    start: int
    stop: int


class Field(NamedTuple):
    """`kind`: int, float, string, bytes or the name of a message."""

    name: str
    kind: str
    repeated: bool = False


SCHEMA: dict[str, dict[int, Field]] = {
    "Model": {
        1: Field("ir_version", "int"),
        2: Field("producer_name", "string"),
        3: Field("producer_version", "string"),
        6: Field("doc_string", "string"),
        8: Field("opset_import", "OperatorSetId", True),
        14: Field("metadata_props", "StringStringEntry", True),
        7: Field("graph", "Graph"),
    },
    "OperatorSetId": {1: Field("domain", "string"), 2: Field("version", "int")},
    "StringStringEntry": {1: Field("key", "string"), 2: Field("value", "string")},
    "Graph": {
        1: Field("node", "Node", True),
        2: Field("name", "string"),
        11: Field("input", "ValueInfo", True),
        12: Field("output", "ValueInfo", True),
        5: Field("initializer", "Tensor", True),
    },
    "Node": {
        1: Field("input", "string", True),
        2: Field("output", "string", True),
        3: Field("name", "string"),
        4: Field("op_type", "string"),
        7: Field("domain", "string"),
        5: Field("attribute", "Attribute", True),
    },
    "Attribute": {
        1: Field("name", "string"),
        20: Field("type", "int"),
        2: Field("f", "float"),
        3: Field("i", "int"),
        4: Field("s", "bytes"),
        5: Field("t", "bytes"),
        6: Field("g", "bytes"),
        7: Field("floats", "float", True),
        8: Field("ints", "int", True),
        9: Field("strings", "bytes", True),
    },
    "Tensor": {
        1: Field("dims", "int", True),
        2: Field("data_type", "int"),
        8: Field("name", "string"),
        12: Field("doc_string", "string"),
        4: Field("float_data", "float", True),
        5: Field("int32_data", "int", True),
        7: Field("int64_data", "int", True),
        14: Field("data_location", "int"),
        9: Field("raw_data", "bytes"),
    },
    "ValueInfo": {1: Field("name", "string"), 2: Field("type", "Type")},
    "Type": {1: Field("tensor_type", "TensorType")},
    "TensorType": {1: Field("elem_type", "int"), 2: Field("shape", "Shape")},
    "Shape": {1: Field("dim", "Dimension", True)},
    "Dimension": {1: Field("dim_value", "int"), 2: Field("dim_param", "string")},
}

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
WIRE_TYPE = {"int": VARINT, "float": FIXED32}
FLOAT = struct.Struct("<f")
Buffer = Union[bytes, memoryview]


class WireError(ValueError):
    """The bytes are not a valid protobuf message of this schema."""


def read_varint(buffer: Buffer, at: int, stop: int) -> tuple[int, int]:
    """Returns (unsigned value, next position)."""
    value = shift = 0
    while at < stop:
        byte = buffer[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7
        if shift > 63:
            raise WireError(f"a varint of more than 10 bytes at {at}")
    raise WireError(f"a varint cut off at {at}")


def signed(value: int) -> int:
    """A varint as int64."""
    return value - (1 << 64) if value >= 1 << 63 else value


def decode(buffer: Buffer, message: str, start: int, stop: int) -> Message:
    """Decodes one message in buffer[start:stop]. Skips unknown fields; bytes fields become a `Span`.

    Raises WireError for a value that does not match its field or exceeds `stop`.
    """
    schema = SCHEMA[message]
    out: Message = {field.name: [] for field in schema.values() if field.repeated}
    at = start
    while at < stop:
        tag, at = read_varint(buffer, at, stop)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, end = read_varint(buffer, at, stop)
        elif wire == BYTES:
            length, at = read_varint(buffer, at, stop)
            value, end = 0, at + length
        elif wire in (FIXED32, FIXED64):
            value, end = 0, at + (4 if wire == FIXED32 else 8)
        else:
            raise WireError(f"wire type {wire} at {at} in {message}")
        if number == 0 or end > stop:
            raise WireError(f"field {number} of {message} at {at} reaches {end - stop} bytes past its end")
        field = schema.get(number)
        if field is not None:
            for item in _values(buffer, field, wire, value, at, end):
                if field.repeated:
                    out[field.name].append(item)
                else:
                    out[field.name] = item
        at = end
    return out


def _values(buffer: Buffer, field: Field, wire: int, value: int, at: int, end: int) -> list[Any]:
    """The values of one occurrence of a field: one, or several if packed."""
    if field.kind in WIRE_TYPE:
        if wire == WIRE_TYPE[field.kind]:
            return [signed(value) if wire == VARINT else FLOAT.unpack(bytes(buffer[at:end]))[0]]
        if wire == BYTES and field.repeated:
            packed = []
            while at < end:
                if field.kind == "int":
                    value, at = read_varint(buffer, at, end)
                    packed.append(signed(value))
                elif at + 4 <= end:
                    packed.append(FLOAT.unpack(bytes(buffer[at : at + 4]))[0])
                    at += 4
                else:
                    raise WireError(f"packed {field.name} cut off at {at}")
            return packed
    elif wire == BYTES:
        if field.kind == "bytes":
            return [Span(at, end)]
        if field.kind == "string":
            try:
                return [bytes(buffer[at:end]).decode("utf-8")]
            except UnicodeDecodeError:
                raise WireError(f"{field.name} at {at} is not UTF-8") from None
        return [decode(buffer, field.kind, at, end)]
    raise WireError(f"{field.name} at {at} has wire type {wire}")


def varint(value: int) -> bytes:
    """Encodes an int64 (negative: ten bytes, as protobuf does)."""
    value &= 0xFFFFFFFFFFFFFFFF
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def tag(message: str, name: str) -> bytes:
    """The tag of a field."""
    number, field = next((number, field) for number, field in SCHEMA[message].items() if field.name == name)
    return varint(number << 3 | WIRE_TYPE.get(field.kind, BYTES))


def encode(message: str, values: Message) -> bytes:
    """Encodes a dict of fields in the order of the schema; absent fields are omitted.

    The inverse of `decode`, with bytes instead of spans.
    """
    out = []
    for number, field in SCHEMA[message].items():
        if field.name not in values:
            continue
        key = varint(number << 3 | WIRE_TYPE.get(field.kind, BYTES))
        for item in values[field.name] if field.repeated else [values[field.name]]:
            out.append(key)
            if field.kind == "int":
                out.append(varint(item))
                continue
            if field.kind == "float":
                out.append(FLOAT.pack(item))
                continue
            body = item.encode() if field.kind == "string" else item if field.kind == "bytes" else None
            body = encode(field.kind, item) if body is None else body
            out += [varint(len(body)), body]
    return b"".join(out)

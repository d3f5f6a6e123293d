"""Describes a vendor's axmodel: metadata, node attributes, and the purpose of its blobs.

The NPU code is closed; the rest is a base64-encoded protobuf message and JSON. All of it is untrusted: depth, length
and number of entries are bounded, and entries that cannot be decoded are marked as such.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

from axrun.format import wire
from axrun.format.axmodel import Axmodel, Node

EXTRA_DATA = "extra_data"
MOST_BYTES = 1 << 20  # of a text to decode
MOST_FIELDS = 4096  # in all messages of a metadata entry
DEEPEST = 12
LONGEST = 200  # characters of a shown text

NPU_MODES = {0: "NPU1", 1: "NPU2", 2: "NPU3"}
BLOBS = (("dyn_params", "dynamic parameters"), ("params", "parameters"), ("neu", "code"), ("data", "code"))


class Undecoded(ValueError):
    """The text cannot be decoded; the message says why."""


def describe(model: Axmodel) -> dict[str, Any]:
    """A JSON-able description of the vendor-specific parts of an axmodel."""
    about: dict[str, Any] = {"commit": model.commit, "npu_mode": None, "nodes": [_node(node) for node in model.nodes]}
    if EXTRA_DATA in model.metadata:
        try:
            decoded = decode_extra_data(model.metadata[EXTRA_DATA])
            about[EXTRA_DATA] = decoded
            about["npu_mode"] = npu_mode(decoded)
            about["chip"] = chip(decoded)
        except Undecoded as error:
            about[EXTRA_DATA] = f"not decoded: {error}"
    return about


def decode_extra_data(text: str) -> dict[str, Any]:
    """Decodes a base64 protobuf message; fields are named by number, e.g. `f4`. Raises Undecoded."""
    if len(text) > MOST_BYTES:
        raise Undecoded(f"it has {len(text):,} characters, at most {MOST_BYTES:,} are read")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Undecoded(f"it is not base64: {error}") from None
    try:
        return _message(data, 0, [MOST_FIELDS])
    except wire.WireError as error:
        raise Undecoded(f"it is no protobuf message: {error}") from None


def npu_mode(extra_data: dict[str, Any]) -> str:
    """The NPU mode, AX_ENGINE_GetModelType 0 to 2: field 3 of field 4; absent for the default, NPU1."""
    target = extra_data.get("f4", {})
    mode = target.get("f3", 0) if isinstance(target, dict) else target
    return NPU_MODES.get(mode, f"unknown ({mode!s:.20})") if isinstance(mode, int) else "unknown"


def chip(extra_data: dict[str, Any]) -> str:
    """A guess, marked as such: field 5 is 1 in files for the AX620E and absent in those for the AX650."""
    return "AX620E (guessed)" if extra_data.get("f5") == 1 else "AX650 (guessed)"


def blob(name: str) -> str:
    """The purpose of a vendor's initializer, from its name; empty if unknown."""
    return next((what for end, what in BLOBS if name.endswith(end)), "")


def _node(node: Node) -> dict[str, Any]:
    attributes = {name: _attribute(value) for name, value in node.attributes.items()}
    return {"name": node.name, "op_type": node.op_type, "attributes": attributes}


def _attribute(value: Any) -> Any:
    """Parses JSON, shortens other text, and omits tensors and graphs."""
    if isinstance(value, wire.Span):
        return None
    if not isinstance(value, str):
        return value if isinstance(value, (int, float)) else list(value)[:MOST_FIELDS]
    if value[:1] in ("{", "[") and len(value) <= MOST_BYTES:
        try:
            parsed = json.loads(value)
            json.dumps(parsed)  # it may be too deeply nested to write, even if it can be read
            return parsed
        except (ValueError, RecursionError):
            pass
    return _short(value)


def _message(data: bytes, depth: int, left: list[int]) -> dict[str, Any]:
    """Fields by number, a repeated one as a list. Raises wire.WireError."""
    if depth > DEEPEST:
        raise wire.WireError(f"messages nested more than {DEEPEST} deep")
    fields: dict[str, Any] = {}
    at = 0
    while at < len(data):
        left[0] -= 1
        if left[0] < 0:
            raise wire.WireError(f"more than {MOST_FIELDS} fields")
        tag, at = wire.read_varint(data, at, len(data))
        number, kind = tag >> 3, tag & 7
        value: Any
        if kind == wire.VARINT:
            value, at = wire.read_varint(data, at, len(data))
            value = wire.signed(value)
        elif kind in (wire.FIXED32, wire.FIXED64, wire.BYTES):
            length = {wire.FIXED32: 4, wire.FIXED64: 8}.get(kind)
            if length is None:
                length, at = wire.read_varint(data, at, len(data))
            if length > len(data) - at:
                raise wire.WireError(f"field {number} has {length} bytes where {len(data) - at} are left")
            body, at = data[at : at + length], at + length
            value = _body(body, depth, left) if kind == wire.BYTES else f"0x{body[::-1].hex()}"
        else:
            raise wire.WireError(f"wire type {kind} in field {number}")
        if not number:
            raise wire.WireError("field 0")
        key = f"f{number}"
        if key not in fields:
            fields[key] = value
        elif isinstance(fields[key], list):
            fields[key].append(value)
        else:
            fields[key] = [fields[key], value]
    return fields


def _body(body: bytes, depth: int, left: list[int]) -> Any:
    """Text, else a message, else bytes: the wire does not say which."""
    text = body.decode("utf-8", "replace")
    if text.isprintable() and "\ufffd" not in text:
        return _short(text)
    try:
        return _message(body, depth + 1, left)
    except wire.WireError:
        if left[0] < 0:
            raise
        return f"{len(body)} bytes {body[:16].hex()}" + ("..." if len(body) > 16 else "")


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text)} characters)"

"""The GGUF container: metadata by key, and where each tensor lies.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md . Files are untrusted: every length is checked against the
file size before use, strings of arrays are decoded on demand, and no number in the file sets how much memory is
allocated.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from axrun.errors import BadInput

MAGIC = b"GGUF"
ORIGINAL = "Give the original checkpoint's folder instead."  # advice for what a GGUF file is not read for
VERSIONS = (2, 3)
ALIGNMENT = "general.alignment"
# far above what models have: vocabularies reach 2**18 tokens and twice as many merges
MAX_KEYS, MAX_TENSORS, MAX_STRINGS = 1 << 14, 1 << 16, 1 << 21
MAX_METADATA = 256 << 20  # bytes before the first tensor
MAX_NAME, MAX_TEXT = 1 << 10, 16 << 20  # bytes of a key or a tensor's name; of a string
MAX_DIMS, MAX_ELEMENTS = 4, 1 << 40

# type number of a metadata value -> struct format
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
BOOL, STRING, ARRAY = 7, 8, 9


class Damaged(ValueError):
    """A fault of a file; the message does not name it."""


@dataclass(frozen=True)
class TensorEntry:
    """`shape` has the row length last, as numpy and torch have it; `offset` and `nbytes` are of the file."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Strings:
    """An array of strings, decoded on iteration."""

    data: NDArray[np.uint8]
    start: int
    count: int
    key: str

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[str]:
        cursor = Cursor(self.data, self.start)
        for index in range(self.count):
            yield cursor.string(f"{self.key}[{index}]")


@dataclass(frozen=True)
class Container:
    """`metadata` holds numbers, bools, strings, numpy arrays of numbers and Strings; `data` is the file, mapped."""

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[TensorEntry, ...]
    data: NDArray[np.uint8]

    @classmethod
    def open(cls, path: Path) -> Container:
        """Reads everything before the tensors. Raises BadInput for damaged, truncated and other files."""
        try:
            data = np.memmap(path, np.uint8, "r")
            metadata, tensors = _read(data)
        except OSError as error:
            raise BadInput(f"cannot read {path}: {error.strerror or error}") from None
        except ValueError as error:  # numpy's, of an empty file, too
            raise BadInput(f"{path} is not a complete GGUF file: {error}\nDownload it again.") from None
        return cls(path, metadata, tensors, data)


class Cursor:
    """Reads values from a position in the file. Raises Damaged beyond its end."""

    def __init__(self, data: NDArray[np.uint8], at: int = 0) -> None:
        self.data, self.at = data.data, at

    def take(self, nbytes: int, what: str) -> memoryview:
        self.skip(nbytes, what)
        return self.data[self.at - nbytes : self.at]

    def skip(self, nbytes: int, what: str) -> None:
        if nbytes > len(self.data) - self.at:
            raise Damaged(f"{what:.80} would need {nbytes} bytes at {self.at}, the file has {len(self.data)}")
        self.at += nbytes

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code), what))[0]

    def string(self, what: str, most: int = MAX_TEXT) -> str:
        length = self.number("Q", what)
        if length > most:
            raise Damaged(f"{what:.80} has {length} bytes; expected at most {most}")
        try:
            return str(self.take(length, what), "utf-8")
        except UnicodeDecodeError:
            raise Damaged(f"{what:.80} is no UTF-8") from None


def _read(data: NDArray[np.uint8]) -> tuple[dict[str, Any], tuple[TensorEntry, ...]]:
    cursor = Cursor(data)
    magic = bytes(cursor.take(4, "the magic"))
    if magic != MAGIC:
        raise Damaged(f"it begins with {magic!r}, expected {MAGIC!r}")
    version = cursor.number("I", "the version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        raise Damaged(f"its version is {version}{' (big-endian)' if swapped else ''}; expected 2 or 3, little-endian")
    tensors, keys = cursor.number("Q", "the number of tensors"), cursor.number("Q", "the number of keys")
    for what, count, most in (("tensors", tensors, MAX_TENSORS), ("keys", keys, MAX_KEYS)):
        if count > most:
            raise Damaged(f"it says it has {count} {what}; expected at most {most}")
    metadata = _metadata(data, cursor, keys)
    entries = [_entry(cursor, index) for index in range(tensors)]
    if cursor.at > MAX_METADATA:
        raise Damaged(f"its metadata has {cursor.at} bytes; expected at most {MAX_METADATA}")
    alignment = metadata.get(ALIGNMENT, 32)
    if not isinstance(alignment, int) or alignment not in [1 << power for power in range(3, 21)]:
        raise Damaged(f"{ALIGNMENT} is {alignment!r:.40}; expected a power of 2 from 8 to 2**20")
    start = -(-cursor.at // alignment) * alignment
    return metadata, _placed(entries, start, alignment, len(data))


def _metadata(data: NDArray[np.uint8], cursor: Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    strings = 0
    for index in range(count):
        key = cursor.string(f"key {index}", MAX_NAME)
        if key in metadata:
            raise Damaged(f"the key {key!r:.80} is there twice")
        value = _value(data, cursor, cursor.number("I", key), key)
        strings += len(value) if isinstance(value, Strings) else 0
        if strings > MAX_STRINGS:
            raise Damaged(f"its metadata has more than {MAX_STRINGS} strings")
        metadata[key] = value
    return metadata


def _value(data: NDArray[np.uint8], cursor: Cursor, kind: int, key: str) -> Any:
    if kind in SCALARS:
        value = cursor.number(SCALARS[kind], key)
        return bool(value) if kind == BOOL else value
    if kind == STRING:
        return cursor.string(key)
    if kind != ARRAY:
        raise Damaged(f"{key!r:.80} has a value of the unknown type {kind}")
    element, count = cursor.number("I", key), cursor.number("Q", key)
    if element in SCALARS:
        code = np.dtype("<" + SCALARS[element])
        if count > len(cursor.data):
            raise Damaged(f"{key!r:.80} says it has {count} elements, the file has {len(cursor.data)} bytes")
        return np.frombuffer(bytes(cursor.take(count * code.itemsize, key)), code)
    if element != STRING:
        raise Damaged(f"{key!r:.80} is an array of the type {element}; expected numbers or strings")
    if count > MAX_STRINGS:
        raise Damaged(f"{key!r:.80} says it has {count} strings; expected at most {MAX_STRINGS}")
    start = cursor.at
    for _ in range(count):
        cursor.skip(cursor.number("Q", key), key)
    return Strings(data, start, count, key)


def _entry(cursor: Cursor, index: int) -> TensorEntry:
    name = cursor.string(f"the name of tensor {index}", MAX_NAME)
    dims = cursor.number("I", name)
    if not 1 <= dims <= MAX_DIMS:
        raise Damaged(f"tensor {name!r:.80} has {dims} dimensions; expected 1 to {MAX_DIMS}")
    shape = tuple(cursor.number("Q", name) for _ in range(dims))[::-1]
    if min(shape) < 1 or math.prod(shape) > MAX_ELEMENTS:
        raise Damaged(f"tensor {name!r:.80} has the shape {list(shape)}; expected 1 to {MAX_ELEMENTS} elements")
    number, offset = cursor.number("I", name), cursor.number("Q", name)
    try:
        kind = GGMLQuantizationType(number)
        block, size = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise Damaged(f"tensor {name!r:.80} has the type {number}, which the gguf package does not know") from None
    if shape[-1] % block:
        raise Damaged(f"tensor {name!r:.80} has rows of {shape[-1]} values, in {kind.name} blocks of {block}")
    return TensorEntry(name, kind, shape, offset, math.prod(shape) // block * size)


def _placed(entries: list[TensorEntry], start: int, alignment: int, end: int) -> tuple[TensorEntry, ...]:
    """With offsets in the file. Raises Damaged for tensors outside of it, overlaps and duplicate names."""
    placed = [TensorEntry(entry.name, entry.kind, entry.shape, start + entry.offset, entry.nbytes) for entry in entries]
    for entry in placed:
        if (entry.offset - start) % alignment:
            raise Damaged(
                f"tensor {entry.name!r:.80} lies at {entry.offset}, which is not aligned to {alignment} bytes"
            )
        if entry.offset + entry.nbytes > end:
            what = f"tensor {entry.name!r:.80} lies at {entry.offset} with {entry.nbytes} bytes"
            raise Damaged(f"{what}, the file has {end}")
    ordered = sorted(placed, key=lambda entry: entry.offset)
    for before, after in itertools.pairwise(ordered):
        if before.offset + before.nbytes > after.offset:
            raise Damaged(f"tensors {before.name!r:.80} and {after.name!r:.80} overlap")
    names = [entry.name for entry in placed]
    for name in names if len(set(names)) != len(names) else ():
        if names.count(name) > 1:
            raise Damaged(f"tensor {name!r:.80} is there twice")
    return tuple(placed)

"""Compares two builds and locates the differences."""

from __future__ import annotations

import itertools
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from axrun.errors import BadInput
from axrun.format import axmodel
from ci.container.archive import config_of, layers_of

BLOCK = 1 << 18
MISSING = "(none)"
# metadata of a file in a tar
ATTRIBUTES = ("type", "mode", "uid", "gid", "size", "mtime", "linkname")


def folders(first: Path, second: Path) -> Iterator[str]:
    """A line for every file that differs between two folders."""
    names = [{path.relative_to(root).as_posix() for path in _files(root)} for root in (first, second)]
    for name in sorted(names[0] | names[1]):
        if name not in names[0] or name not in names[1]:
            yield f"{name}: only in {first if name in names[0] else second}"
            continue
        yield from files(first / name, second / name, name)


def files(first: Path, second: Path, name: str) -> Iterator[str]:
    """At most one line: the first byte that differs, and for an axmodel the tensor it belongs to."""
    with first.open("rb") as a, second.open("rb") as b:
        at = first_difference(a, b)
    if at is not None:
        sizes = first.stat().st_size, second.stat().st_size
        longer = f" ({sizes[0]:,} and {sizes[1]:,} bytes)" if sizes[0] != sizes[1] else ""
        yield f"{name}: differs from byte {at:,} on{_field(first, at)}{longer}"


def images(first: Path, second: Path) -> Iterator[str]:
    """A line for every differing field of the configs and file of the layers of two image archives."""
    yield from _values("config", config_of(first), config_of(second))
    pairs = itertools.zip_longest(layers_of(first), layers_of(second))
    for index, (a, b) in enumerate(pairs):
        if a is None or b is None:
            yield f"layer {index}: only in {second if a is None else first}"
        elif a[0] != b[0]:  # they are named by content
            yield from (f"layer {index}, {line}" for line in layers(a[1], b[1]))


def layers(first: IO[bytes], second: IO[bytes]) -> Iterator[str]:
    """A line for every entry that differs between two layers' tars; if none does, the first difference in order."""
    with tarfile.open(fileobj=first) as a, tarfile.open(fileobj=second) as b:
        entries = {entry.name: entry for entry in a}, {entry.name: entry for entry in b}
        found = False
        for name in sorted({*entries[0], *entries[1]}):
            one, other = (side.get(name) for side in entries)
            if one is None or other is None:
                line = f"{name}: only in the {'first' if other is None else 'second'}"
            else:
                line = _entries(a, one, b, other)
            if line:
                found = True
                yield line
        if not found:
            order = zip(entries[0], entries[1], strict=True)
            yield next((f"{x}: stands where the second has {y}" for x, y in order if x != y), "headers: differ")


def first_difference(first: IO[bytes], second: IO[bytes]) -> int | None:
    """Offset of the first differing byte; None if the streams are equal."""
    at = 0
    while True:
        a, b = first.read(BLOCK), second.read(BLOCK)
        if a != b:
            return at + next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        if not a:
            return None
        at += len(a)


def _entries(a: tarfile.TarFile, one: tarfile.TarInfo, b: tarfile.TarFile, other: tarfile.TarInfo) -> str:
    said = [
        f"{name} {getattr(one, name)!r} and {getattr(other, name)!r}"
        for name in ATTRIBUTES
        if getattr(one, name) != getattr(other, name)
    ]
    said += [f"{k} differs" for k in sorted({*one.pax_headers, *other.pax_headers}) if k.startswith("SCHILY.")
             and one.pax_headers.get(k) != other.pax_headers.get(k)]  # fmt: skip
    if one.isreg() and other.isreg():
        content, others = a.extractfile(one), b.extractfile(other)
        at = first_difference(content, others) if content and others else None
        said += [f"differs from byte {at:,} on"] if at is not None else []
    return f"{one.name}: {', '.join(said)}" if said else ""


def _values(where: str, one: Any, other: Any) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            yield from _values(f"{where}.{key}", one.get(key, MISSING), other.get(key, MISSING))
    elif one != other:
        yield f"{where}: {one!r:.80} and {other!r:.80}"


def _field(path: Path, at: int) -> str:
    """The tensor at offset `at` of an axmodel, e.g. ` (in model.norm.weight, its byte 12)`; empty for other files."""
    if path.suffix != ".axmodel":
        return ""
    try:
        tensors = axmodel.read(path).initializers.values()
    except BadInput:
        return ""
    for tensor in tensors:
        if 0 <= tensor.offset <= at < tensor.offset + tensor.nbytes:
            return f" (in {tensor.name}, its byte {at - tensor.offset:,})"
    return " (outside the weights)"


def _files(root: Path) -> Iterator[Path]:
    return (path for path in root.rglob("*") if path.is_symlink() or not path.is_dir())

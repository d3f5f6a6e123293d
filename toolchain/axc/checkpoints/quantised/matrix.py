"""A quantised matrix of a folder: its stored tensors, and its reader."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from axc.stored import Grid, Rows, StoredTensor
from axrun.errors import BadInput
from axrun.format.dtypes import bf16_to_f32

Floats = NDArray[np.float32]
BAND = 1 << 22  # bytes of a packed matrix that are transposed at a time
SCALES = ("FLOAT16", "BFLOAT16", "FLOAT")
MAX_COLUMNS = 1 << 24


@dataclass(frozen=True)
class Raw:
    """The stored tensors of a folder, by the names that transformers would give them."""

    tensors: Mapping[str, StoredTensor]
    array: Callable[[StoredTensor], NDArray[Any]]

    def modules(self, suffix: str) -> list[str]:
        """The modules with a tensor of this name."""
        return [name.removesuffix(f".{suffix}") for name in self.tensors if name.endswith(f".{suffix}")]

    def find(self, module: str, suffix: str) -> StoredTensor | None:
        return self.tensors.get(f"{module}.{suffix}")

    def need(self, module: str, suffix: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...]) -> StoredTensor:
        """A tensor of a module; None in `shape` matches any size. Raises BadInput if it is missing or another."""
        stored = self.find(module, suffix)
        if stored is None:
            file = next(tensor for name, tensor in self.tensors.items() if name.startswith(f"{module}.")).file
            raise BadInput(f"{file}: {module}.{suffix} is missing, without which {module} cannot be read\n{AGAIN}")
        if stored.dtype not in dtypes:
            raise BadInput(f"{stored.file}: {stored.key} is stored as {stored.dtype}; expected {' or '.join(dtypes)}")
        fits = len(stored.shape) == len(shape) and all(
            size == wanted if wanted is not None else 1 <= size <= MAX_COLUMNS
            for size, wanted in zip(stored.shape, shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("n" if size is None else str(size) for size in shape)
            raise BadInput(
                f"{stored.file}: {stored.key} has shape {list(stored.shape)}; expected [{wanted}] beside the others "
                f"of {module}\n{AGAIN}"
            )
        return stored


AGAIN = "The checkpoint is damaged or config.json is not its own; get it again."


class ScaledRows(Rows, Protocol):
    """Reads a quantised matrix."""

    def group_scales(self, start: int, stop: int) -> Floats:
        """The scales of rows [start, stop): [n, groups]."""

    def group_levels(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Whether a group of rows [start, stop) has a level that is not 0: [n, groups]."""


@dataclass(frozen=True)
class Matrix:
    """A tensor as presented, and its reader."""

    stored: StoredTensor
    rows: ScaledRows


@dataclass(frozen=True)
class Integers:
    """Levels [out, in] with a scale, and optionally a zero point, per group of columns.

    `codes` gives levels int8 [n, in], `scales` float32 [n, groups], `zeros` int8 [n, groups]. `groups` is each column's
    group where they are not `block` columns each, one after another. `symmetric`: all zero points are to be 0.
    """

    name: str
    file: Path
    codes: Rows
    scales: Rows
    zeros: Rows | None
    block: int
    groups: NDArray[np.int64] | None = field(default=None, repr=False)
    symmetric: bool = True

    def __call__(self, start: int, stop: int) -> Floats:
        """(level - zero point) * scale in float32."""
        levels, scales, zeros = self.codes(start, stop), self.scales(start, stop), self._zeros(start, stop)
        values = levels.astype(np.float32)
        cut = values[:, :, None] if self.groups is not None else values.reshape(len(values), -1, self.block)
        if self.groups is not None:
            scales = scales[:, self.groups]
            zeros = None if zeros is None else zeros[:, self.groups]
        if zeros is not None:
            cut -= zeros[:, :, None]  # exact: both are small
        with np.errstate(over="ignore", invalid="ignore"):  # refused by the caller
            cut *= scales[:, :, None]
        return values

    def levels(self, start: int, stop: int) -> tuple[NDArray[Any], ...]:
        """Levels in the order that makes groups contiguous, scales, and zero points unless symmetric."""
        levels = self.codes(start, stop)
        if self.groups is not None:
            levels = np.ascontiguousarray(levels[:, self.order()])
        zeros = self._zeros(start, stop)
        parts = (levels, self.scales(start, stop))
        return parts if zeros is None else (*parts, zeros)

    def group_scales(self, start: int, stop: int) -> Floats:
        return np.asarray(self.scales(start, stop), np.float32)

    def group_levels(self, start: int, stop: int) -> NDArray[np.bool_]:
        levels, zeros = self.codes(start, stop), self._zeros(start, stop)
        groups = staircase(levels.shape[1], self.block) if self.groups is None else self.groups
        order = np.argsort(groups, kind="stable")
        present = np.unique(groups)
        filled = levels != (0 if zeros is None else zeros[:, groups])
        found = np.zeros((len(levels), int(self.group_scales(start, stop).shape[1])), np.bool_)
        found[:, present] = np.logical_or.reduceat(filled[:, order], np.searchsorted(groups[order], present), axis=1)
        return found

    def order(self) -> NDArray[np.int64]:
        """The column order that makes groups contiguous."""
        assert self.groups is not None  # else nothing is reordered
        return np.argsort(self.groups, kind="stable")

    def _zeros(self, start: int, stop: int) -> NDArray[np.int8] | None:
        if self.zeros is None:
            return None
        zeros: NDArray[np.int8] = self.zeros(start, stop)
        if not self.symmetric:
            return zeros
        if zeros.any():
            row, group = (int(i) for i in np.argwhere(zeros)[0])
            raise BadInput(
                f"{self.file}: {self.name} has a zero point off by {int(zeros[row, group])} (row {start + row}, group "
                f"{group}); config.json says that it is symmetric\n{AGAIN}"
            )
        return None

    def matrix(self, packed: StoredTensor, shape: tuple[int, int], bits: int, scale_dtype: str, kind: str) -> Matrix:
        """As the tensor `NAME.weight` of float32 rows. `packed` holds the codes, `kind` names the format."""
        name, grid = f"{self.name}.weight", self.grid(bits, scale_dtype)
        kind = kind if grid else f"{kind} in groups of different sizes"
        return Matrix(StoredTensor(name, "FLOAT", shape, packed.file, packed.key, kind, grid), self)

    def grid(self, bits: int, scale_dtype: str) -> Grid | None:
        """The grid; None if groups differ in size."""
        half = 1 << (bits - 1)
        if self.groups is not None and (np.bincount(self.groups) != self.block).any():
            return None
        kept = "FLOAT16" if scale_dtype == "FLOAT16" else "FLOAT"
        order = "" if self.groups is None else hashlib.sha256(self.groups.tobytes()).hexdigest()[:16]
        return Grid(-half, half - 1, self.block, kept, not self.symmetric, order)


def column_groups(file: Path, key: str, index: NDArray[Any], count: int, block: int) -> NDArray[np.int64] | None:
    """`index` [in], each column's group; None where they are `block` columns each, one after another.

    Raises BadInput for an index that is none of `count` groups.
    """
    groups = index.astype(np.int64)
    if groups.min() < 0 or groups.max() >= count:
        odd = int(groups[(groups < 0) | (groups >= count)][0])
        raise BadInput(f"{file}: {key} names group {odd}; there are {count}\n{AGAIN}")
    return None if np.array_equal(groups, staircase(len(groups), block)) and len(groups) % block == 0 else groups


def whole_groups(stored: StoredTensor, columns: int, block: int) -> None:
    """Raises BadInput unless `block` divides `columns`: other group sizes could give the same number of groups."""
    if columns % block:
        raise BadInput(
            f"{stored.file}: {stored.key} has {columns} columns; the group_size {block} does not divide that\n{AGAIN}"
        )


def staircase(columns: int, block: int) -> NDArray[np.int64]:
    """Each column's group where they are `block` columns each, one after another."""
    return np.arange(columns, dtype=np.int64) // block


def widened(array: NDArray[Any], dtype: str) -> Floats:
    return bf16_to_f32(np.ascontiguousarray(array)) if dtype == "BFLOAT16" else array.astype(np.float32)


def nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[n, k] bytes as [n, 2 k], the low half of each first."""
    halves = np.empty((*packed.shape, 2), np.uint8)
    np.bitwise_and(packed, 15, out=halves[..., 0])
    np.right_shift(packed, 4, out=halves[..., 1])
    return halves.reshape(len(packed), -1)


def unsigned(words: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """Numbers of 4 or 8 bits that rows [n, k] of 32-bit words hold, the lowest bits first."""
    octets = np.ascontiguousarray(words, "<i4").view(np.uint8)
    return nibbles(octets) if bits == 4 else octets


def signed(codes: NDArray[np.uint8], bits: int) -> NDArray[np.int8]:
    """Codes minus half of their range."""
    return np.asarray((codes - np.uint8(1 << (bits - 1))).view(np.int8))


class Columns:
    """Columns of a mapped matrix [in, out] as rows: transposed in bands, with the last band cached."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array
        height = len(array) * array.itemsize
        self.width = max(min(BAND // max(height, 1), 1 << 10), 1)
        self.band: tuple[int, NDArray[Any]] | None = None

    def __call__(self, start: int, stop: int) -> NDArray[Any]:
        """Columns [start, stop) as [stop - start, in]."""
        parts = []
        while start < stop:
            first = start // self.width * self.width
            if self.band is None or self.band[0] != first:
                self.band = (first, np.ascontiguousarray(self.array[:, first : first + self.width].T))
            end = min(stop, first + self.width)
            parts.append(self.band[1][start - first : end - first])
            start = end
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

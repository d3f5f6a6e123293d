"""Weight sources: how the weights of an axmodel are computed from tensors of a checkpoint, in blocks of rows.

A family lists its weights with a source for each (`axc.families`). `sources` has the kinds of sources, `cross_check`
compares the tensors that they read with those in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from axc.stored import BLOCK_ELEMENTS, widen
from axrun.errors import BadInput

Shape = tuple[int, ...]


class Tensors(Protocol):
    """The tensors that sources read: of a checkpoint, or of an independent reader of one."""

    def dtype(self, name: str) -> str:
        """ONNX's name of a tensor's element type."""

    def finite_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop) along the first dimension as stored; bfloat16 as uint16.

        Raises BadInput for values that are not finite.
        """


class PackedTensors(Tensors, Protocol):
    """A checkpoint that may have quantised matrices."""

    def levels(self, name: str, start: int, stop: int) -> Iterator[tuple[NDArray[Any], ...]]:
        """Rows [start, stop) of a matrix in blocks: levels int8 [n, in], scales float32 [n, in / block], and zero
        points int8 [n, in / block] if it has them.
        """

    def order(self, name: str) -> NDArray[np.int64]:
        """The column index of each column of `levels`."""


class Source(Protocol):
    """How one weight is computed."""

    @property
    def shape(self) -> Shape:
        """The shape of the weight; matrices are [out, in]."""

    @property
    def reads(self) -> Mapping[str, Shape]:
        """The tensors that it reads, with their expected shapes."""

    def dtype(self, tensors: Tensors) -> str:
        """The element type of `rows`."""

    def rows(self, tensors: Tensors, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop) of the weight; bfloat16 as uint16. Raises BadInput for values that are not finite."""


def blocks(source: Source, tensors: Tensors, rows: int = 1) -> Iterator[tuple[int, NDArray[Any]]]:
    """The weight in blocks of whole rows: (first row, block). Block heights are multiples of `rows`."""
    width = int(np.prod(source.shape[1:], dtype=np.int64))
    height = max(BLOCK_ELEMENTS // max(width, 1) // rows, 1) * rows
    for start in range(0, source.shape[0], height):
        yield start, source.rows(tensors, start, min(start + height, source.shape[0]))


def float32(name: str, source: Source, tensors: Tensors) -> NDArray[np.float32]:
    """A whole weight as float32; for the small ones (norms, biases). Raises BadInput."""
    return np.concatenate([block for _, block in float32_blocks(name, source, tensors)])


def float32_blocks(
    name: str, source: Source, tensors: Tensors, rows: int = 1
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """The same in the blocks of `blocks`. Raises BadInput."""
    dtype = source.dtype(tensors)
    for start, block in blocks(source, tensors, rows):
        try:
            yield start, widen(block, dtype)
        except OverflowError as overflow:
            raise BadInput(f"{name} holds {overflow}") from None

"""Writes an axmodel as a stream, so that memory does not grow with the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from axc.checkpoints import widen
from axc.graph import Order, Parameter, Vector, Weight
from axc.quantizer import SquaredError
from axc.quantizer.kept import Kept
from axc.weights import PackedTensors, blocks, float32
from axc.weights.sources import Gathered
from axrun.errors import BadInput
from axrun.format.axmodel import Axmodel, layout


@dataclass
class Written:
    """A written file. `weight_error`: relative quantisation error by tensor."""

    sha256: str
    nbytes: int
    weight_error: dict[str, float] = field(default_factory=dict)


class HashingFile:
    """Computes the sha256 of a file while writing it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash, self.nbytes = file, hashlib.sha256(), 0

    def write(self, data: bytes | NDArray[Any]) -> None:
        view = data if isinstance(data, bytes) else np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        self.hash.update(view)
        self.file.write(view)
        self.nbytes += len(view)

    def result(self) -> Written:
        return Written(self.hash.hexdigest(), self.nbytes)


def write_file(path: Path, pieces: Iterator[bytes | NDArray[Any]]) -> Written:
    """Writes `pieces` to a temporary file beside `path` and renames it, so that `path` is complete or absent."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            out = HashingFile(file)
            for piece in pieces:
                out.write(piece)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return out.result()


def write_axmodel(
    path: Path,
    model: Axmodel,
    parameters: dict[str, Parameter],
    tensors: PackedTensors,
    tick: Callable[[], None] = lambda: None,
) -> Written:
    """Writes `model` with the data of `parameters`, read from `tensors`. Raises BadInput, OSError.

    `tick` is called between pieces; it may raise to stop writing.
    """
    content = Content(tensors)

    def pieces() -> Iterator[bytes | NDArray[Any]]:
        for part in layout(model):
            if isinstance(part, bytes):
                yield part
                continue
            written = 0
            for piece in content.data(parameters[part.tensor.name]):
                tick()
                yield piece
                written += piece.nbytes
            if written != part.tensor.nbytes:
                raise BadInput(
                    f"{part.tensor.name} changed while it was read\nBuild again once the checkpoint is complete."
                )

    written = write_file(path, pieces())
    written.weight_error = {name: error.relative for name, error in content.errors.items() if error.signal}
    return written


class Content:
    """The data of initializers.

    The parts of a weight (levels, scales, zero points) must be requested in order: the first computes all of them.
    """

    def __init__(self, tensors: PackedTensors) -> None:
        self.tensors = tensors
        self.errors: dict[str, SquaredError] = {}
        self.later: dict[tuple[str, int], list[NDArray[Any]]] = {}

    def data(self, parameter: Parameter) -> Iterator[NDArray[Any]]:
        if isinstance(parameter, Vector):
            vector = float32(parameter.name, parameter.source, self.tensors)
            yield vector[self.tensors.order(parameter.rows_as)] if parameter.rows_as else vector
        elif isinstance(parameter, Weight):
            yield from self._weight(parameter)
        elif isinstance(parameter, Order):
            yield self.tensors.order(parameter.tensor)
        else:
            yield parameter

    def _weight(self, weight: Weight) -> Iterator[NDArray[Any]]:
        kind = weight.weight_type
        if weight.part:
            later = self.later.pop((weight.name, weight.part))
            yield from kind.finish(weight.part, later) if isinstance(kind, Kept) else later
            return
        if isinstance(kind, Kept):
            for arrays in self._levels(weight, kind):
                try:
                    first = self._keep_rest(weight, kind.write(*arrays))
                except OverflowError as overflow:
                    raise BadInput(f"{weight.name} holds {overflow}") from None
                yield first
            return
        error = self.errors.setdefault(weight.name, SquaredError())
        source = Gathered(weight.source, self.tensors.order(weight.rows_as)) if weight.rows_as else weight.source
        dtype = source.dtype(self.tensors)
        for _, block in blocks(source, self.tensors):
            try:
                first = self._keep_rest(weight, kind.store(block, dtype, error))
            except OverflowError as overflow:
                raise BadInput(f"{weight.name} holds {overflow}\nChoose another type for it.") from None
            yield first

    def _levels(self, weight: Weight, kind: Kept) -> Iterator[tuple[NDArray[Any], ...]]:
        """What is kept of a matrix, in blocks of rows."""
        pieces = self.tensors.levels(kind.tensor, kind.start, kind.start + weight.source.shape[0])
        if kind.calibrated:
            pieces = self._measured(weight, pieces)
        if not weight.rows_as:
            yield from pieces
            return
        order = self.tensors.order(weight.rows_as)
        whole: list[NDArray[Any]] = []
        start, height = 0, 1
        for arrays in pieces:
            whole = whole or [np.empty((len(order), array.shape[1]), array.dtype) for array in arrays]
            height = max(height, len(arrays[0]))
            for array, rows in zip(whole, arrays, strict=True):
                array[start : start + len(rows)] = rows
            start += len(arrays[0])
        for first in range(0, len(order), height):
            yield tuple(array[order[first : first + height]] for array in whole)

    def _measured(
        self, weight: Weight, pieces: Iterator[tuple[NDArray[Any], ...]]
    ) -> Iterator[tuple[NDArray[Any], ...]]:
        """`pieces`, which are calibrated, as their errors are added up."""
        start = 0
        for arrays in pieces:
            self._measure(weight, start, *arrays)
            start += len(arrays[0])
            yield arrays

    def _measure(self, weight: Weight, start: int, levels: NDArray[np.int8], scales: NDArray[np.float32]) -> None:
        """Adds the quantisation error of calibrated rows from `start` on."""
        stop = start + len(levels)
        wanted = widen(weight.source.rows(self.tensors, start, stop), weight.source.dtype(self.tensors))
        values = levels.reshape(*scales.shape, -1) * scales[:, :, None]
        error = self.errors.setdefault(weight.name, SquaredError())
        error.noise += float(np.square(values.reshape(wanted.shape) - wanted, dtype=np.float64).sum())
        error.signal += float(np.square(wanted, dtype=np.float64).sum())

    def _keep_rest(self, weight: Weight, arrays: Iterator[NDArray[Any]]) -> NDArray[Any]:
        """Returns the first part of a block, and keeps the others for later."""
        first, *rest = arrays
        for part, array in enumerate(rest, 1):
            self.later.setdefault((weight.name, part), []).append(array)
        return first

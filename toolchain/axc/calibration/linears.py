"""Which linear of transformers' model computes what a matrix of an axmodel does, and how their rows and columns map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from axc.calibration.file import Calibrated
from axc.weights import Source
from axc.weights.sources import Affine, Columns, Gathered, Rows, Stacked, Stored

Index = NDArray[np.int64]
Floats = NDArray[np.float64]
SMALLEST_BLOCK = 16


@dataclass(frozen=True)
class Piece:
    """Rows of an axmodel's matrix: `rows` of the tensor `name`, times `factor`; its columns are `columns` of it."""

    name: str
    rows: Index
    factor: float = 1.0
    columns: Index | None = None


@dataclass(frozen=True)
class Matrix:
    """A matrix of an axmodel that is calibrated. `layer` is one behind the last for the head."""

    name: str
    source: Source
    pieces: list[Piece]
    layer: int
    weight_type: str
    block: int

    @property
    def bits(self) -> float:
        return (4 if self.weight_type == "s4" else 8) + 16 / self.block

    def calibrated(self, noise: Floats, signal: Floats) -> Calibrated:
        """With the `energies` of the error and of the matrix."""
        return Calibrated(
            self.weight_type, self.block, self.bits, *(_relative(*both) for both in zip(noise, signal, strict=True))
        )


def energies(weights: Any, hessian: Any) -> Floats:
    """Of a matrix [out, in]: of its values, and of its outputs for the inputs of a Hessian."""
    outputs = float(((weights @ hessian) * weights).sum(dtype=torch.float64))
    return np.array([float(weights.square().sum(dtype=torch.float64)), max(outputs, 0.0)])


def _relative(noise: float, signal: float) -> float:
    """Root of noise over signal in four digits: more would tell one instruction set from another."""
    return float(f"{(noise / signal) ** 0.5 if signal else 0.0:.4g}")


def pieces(source: Source) -> list[Piece] | None:
    """A matrix as rows of stored tensors, in its order; None where it is made otherwise."""
    if isinstance(source, Stored):
        return [Piece(source.name, np.arange(source.shape[0]))]
    if isinstance(source, Stacked):
        parts = [pieces(part) for part in source.sources]
        return None if None in parts else [piece for part in parts for piece in part or []]
    if not isinstance(source, Rows | Gathered | Columns | Affine):
        return None
    inner = pieces(source.source)
    if inner is None or len(inner) != 1:
        return None
    (piece,) = inner
    if isinstance(source, Rows):
        return [Piece(piece.name, piece.rows[source.start : source.stop], piece.factor, piece.columns)]
    if isinstance(source, Gathered):
        return [Piece(piece.name, piece.rows[source.index], piece.factor, piece.columns)]
    if isinstance(source, Columns):
        columns = source.index if piece.columns is None else piece.columns[source.index]
        return [Piece(piece.name, piece.rows, piece.factor, columns)]
    if source.offset or not source.factor:
        return None
    return [Piece(piece.name, piece.rows, piece.factor * source.factor, piece.columns)]

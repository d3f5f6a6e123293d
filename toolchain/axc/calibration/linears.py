"""Which linear of transformers' model computes what a matrix of an axmodel does, and how their rows and columns map."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from axc.weights import Source
from axc.weights.sources import Affine, Columns, Gathered, Rows, Stacked, Stored

Index = NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """Rows of an axmodel's matrix: `rows` of the tensor `name`, times `factor`; its columns are `columns` of it."""

    name: str
    rows: Index
    factor: float = 1.0
    columns: Index | None = None


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

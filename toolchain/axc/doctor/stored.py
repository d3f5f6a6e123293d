"""The weights of an axmodel as float32, by the names they have in the checkpoint.

Dequantised as ONNX defines DequantizeLinear: https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from axrun.format.axmodel import Axmodel, Tensor
from axrun.format.dtypes import DTYPES, to_float32

Floats = NDArray[np.float32]

ENDS = {"INT8": (-127, 127), "INT4": (-8, 7)}  # of the levels that the compiler uses
FLOAT_TYPES = ("FLOAT", "FLOAT16", "BFLOAT16")


@dataclass(frozen=True)
class Stored:
    """A tensor of an axmodel: floats, or integer levels with `scales` of blocks of `block` columns."""

    name: str
    tensor: Tensor
    scales: Tensor | None = None
    block: int = 0

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.dims

    @property
    def integer(self) -> bool:
        return self.scales is not None

    def levels(self, start: int, stop: int) -> NDArray[np.int8]:
        """Integer values of rows [start, stop): [n, in]."""
        columns = self.shape[1]
        if self.dtype == "INT8":
            return np.asarray(self.tensor.array()[start:stop])
        packed = self.tensor.array()[start * columns // 2 : -(-stop * columns // 2)]
        return unpack4(packed)[: (stop - start) * columns].reshape(stop - start, columns)

    def scale_rows(self, start: int, stop: int) -> Floats:
        """The scales of rows [start, stop): [n, blocks]."""
        assert self.scales is not None
        return np.asarray(self.scales.array()[start:stop], np.float32).reshape(stop - start, -1)

    def values(self, start: int = 0, stop: int | None = None) -> Floats:
        """Rows [start, stop) as float32."""
        stop = self.shape[0] if stop is None else min(stop, self.shape[0])
        if not self.integer:
            return to_float32(self.tensor.array()[start:stop], self.dtype)
        return dequantized(self.levels(start, stop), self.scale_rows(start, stop), self.block)


def dequantized(levels: NDArray[np.int8], scales: Floats, block: int) -> Floats:
    """levels [n, in] times scales [n, in / block]."""
    rows, columns = levels.shape
    cut = levels.reshape(rows, columns // block, block).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.asarray((cut * scales[:, :, None]).reshape(rows, columns))


def unpack4(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Two values from each byte, the low half first."""
    halves = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1).astype(np.int8)
    return np.asarray((halves ^ 8) - 8, np.int8)


def read(model: Axmodel) -> dict[str, Stored]:
    """Every initializer by name; a quantised one with its scales, which are not listed again."""
    tensors = model.initializers
    found: dict[str, Stored] = {}
    scales: set[str] = set()
    for node in model.nodes:
        if node.op_type != "DequantizeLinear" or not {*node.inputs[:2]} <= tensors.keys():
            continue
        matrix, factors = (tensors[name] for name in node.inputs[:2])
        if matrix.dtype not in ENDS or factors.dtype != "FLOAT" or len(matrix.dims) != 2 or not matrix.dims[1]:
            continue
        block = _block(node.attributes, matrix, factors)
        if block:
            found[matrix.name] = Stored(matrix.name, matrix, factors, block)
            scales.add(factors.name)
    for name, tensor in tensors.items():
        if name not in found and name not in scales and tensor.dtype in DTYPES:
            found[name] = Stored(name, tensor)
    return found


def _block(attributes: Any, matrix: Tensor, factors: Tensor) -> int:
    """Columns that share a scale; 0 where the file does not fit together."""
    rows, columns = matrix.dims
    block = columns if attributes.get("axis", 1) == 0 else attributes.get("block_size", 0)
    if not isinstance(block, int) or block <= 0 or columns % block:
        return 0
    count = 1
    for dim in factors.dims:
        count *= dim
    return block if count == rows * (columns // block) else 0

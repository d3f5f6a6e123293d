"""Matrices stored as levels, integers or 8-bit floats: value = (level - zero point) x scale, one for each block.

In the graph `[Cast ->] DequantizeLinear`, the scales float32, or float16 behind a Cast:
https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from axrun.format.axmodel import Axmodel, Node, Tensor
from axrun.format.dtypes import DTYPES, FLOAT8, to_float32

Floats = NDArray[np.float32]

LEVELS = ("INT8", "INT4", *FLOAT8)
SCALES = ("FLOAT", "FLOAT16")


@dataclass(frozen=True)
class Quantised:
    """The tensors of a matrix [out, in], of which `block` columns share a scale and a zero point.

    `zeros` None: every zero point is 0. The last block of a row may be short.
    """

    levels: Tensor
    scales: Tensor
    zeros: Tensor | None
    block: int

    @property
    def blocks(self) -> int:
        """Of a row."""
        return -(-self.levels.dims[1] // self.block)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return (self.levels, self.scales) if self.zeros is None else (self.levels, self.scales, self.zeros)

    def level_rows(self, start: int, stop: int) -> NDArray[Any]:
        """Levels of rows [start, stop) as they are stored: int8, or float32 of 8-bit floats, [n, in]."""
        if self.levels.dtype in FLOAT8:
            return to_float32(self.levels.array()[start:stop], self.levels.dtype)
        return integers(self.levels, start, stop, self.levels.dims[1])

    def scale_rows(self, start: int, stop: int) -> Floats:
        """[n, blocks]"""
        return np.asarray(self.scales.array()[start:stop], np.float32).reshape(stop - start, -1)

    def zero_rows(self, start: int, stop: int) -> NDArray[np.int8]:
        """[n, blocks]"""
        if self.zeros is None:
            return np.zeros((stop - start, self.blocks), np.int8)
        return integers(self.zeros, start, stop, self.blocks)


def makers(model: Axmodel) -> dict[str, Node]:
    """The node that each value comes from."""
    return {output: node for node in model.nodes for output in node.outputs}


def quantised(model: Axmodel, node: Node, made_by: Mapping[str, Node]) -> Quantised | None:
    """The matrix that a DequantizeLinear widens; None for another node, or where the tensors do not fit together."""
    tensors = model.initializers
    if node.op_type != "DequantizeLinear" or len(node.inputs) < 2:
        return None
    levels, scales = tensors.get(node.inputs[0]), tensors.get(node.inputs[1])
    cast = made_by.get(node.inputs[1])
    if cast is not None and cast.op_type == "Cast" and cast.attributes.get("to") == DTYPES["FLOAT"].onnx:
        scales = tensors.get(cast.inputs[0])
        if scales is not None and scales.dtype != "FLOAT16":
            return None
    elif scales is not None and scales.dtype != "FLOAT":
        return None
    given = node.inputs[2] if len(node.inputs) > 2 else ""
    zeros = tensors.get(given)
    if levels is None or scales is None or (given and zeros is None):
        return None
    if levels.dtype not in LEVELS or len(levels.dims) != 2 or not all(levels.dims):
        return None
    if zeros is not None and levels.dtype in FLOAT8:
        return None
    if zeros is not None and (zeros.dtype, zeros.dims) != (levels.dtype, scales.dims):
        return None
    rows, columns = levels.dims
    block = node.attributes.get("block_size", 0)
    axis = node.attributes.get("axis", 1)
    if not block and axis in (0, -2) and scales.dims == (rows,):
        return Quantised(levels, scales, zeros, columns)
    if not isinstance(block, int) or block <= 0 or axis not in (1, -1) or scales.dims != (rows, -(-columns // block)):
        return None
    return Quantised(levels, scales, zeros, block)


def integers(tensor: Tensor, start: int, stop: int, width: int) -> NDArray[np.int8]:
    """Rows [start, stop) of an INT8 or INT4 tensor whose rows have `width` elements: int8 [n, width]."""
    array: NDArray[Any] = tensor.array()
    if tensor.dtype == "INT8":
        return np.asarray(array.reshape(-1, width)[start:stop], np.int8)
    first, last = start * width, stop * width
    values = unpack4(array[first // 2 : -(-last // 2)])
    return values[first % 2 : first % 2 + last - first].reshape(-1, width)


def unpack4(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Two values from each byte, the low half first."""
    halves = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1).astype(np.int8)
    return np.asarray((halves ^ 8) - 8, np.int8)


def pack4(values: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Two 4-bit values to a byte, the first in the low half; a half that is left over is 0."""
    nibbles = values.reshape(-1).view(np.uint8) & np.uint8(15)
    if len(nibbles) % 2:
        nibbles = np.append(nibbles, np.uint8(0))
    pairs = nibbles.reshape(-1, 2)
    return np.asarray(pairs[:, 0] | pairs[:, 1] << np.uint8(4))

"""The weights of an axmodel as float32, by the names they have in the checkpoint.

Dequantised as ONNX defines DequantizeLinear: https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from axrun.format.axmodel import Axmodel, Node, Tensor
from axrun.format.dtypes import DTYPES, FLOAT8, to_float32
from axrun.format.quantised import Quantised, makers, quantised

Floats = NDArray[np.float32]
Levels = NDArray[Any]  # int8; int16 after subtracting zero points; float32 for 8-bit floats

# The range of quantised values that the compiler writes.
ENDS: dict[str, tuple[float, float]] = {"INT8": (-127, 127), "INT4": (-8, 7)}
ENDS |= {name: (-kind.largest, kind.largest) for name, kind in FLOAT8.items()}
FLOAT_TYPES = ("FLOAT", "FLOAT16", "BFLOAT16")


@dataclass(frozen=True)
class Stored:
    """A tensor of an axmodel: floats, or the quantised values `packed`.

    `order`: a tensor with the checkpoint's column index of each stored column; None if the order is the same.
    """

    name: str
    tensor: Tensor
    packed: Quantised | None = None
    order: Tensor | None = None

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.dims

    @property
    def scaled(self) -> bool:
        return self.packed is not None

    @property
    def block(self) -> int:
        """Columns that share a scale."""
        return self._packed.block

    @property
    def scale_dtype(self) -> str:
        return self._packed.scales.dtype

    @property
    def zeros(self) -> Tensor | None:
        """The zero points, if any."""
        return self._packed.zeros

    @property
    def _packed(self) -> Quantised:
        assert self.packed is not None
        return self.packed

    def levels(self, start: int, stop: int) -> Levels:
        """Quantised values of rows [start, stop) minus zero points: [n, in]."""
        levels = self._packed.level_rows(start, stop)
        if self._packed.zeros is None:
            return levels
        zeros = np.repeat(self._packed.zero_rows(start, stop), self.block, axis=1)
        return np.asarray(levels.astype(np.int16) - zeros, np.int16)

    def ends(self, start: int, stop: int) -> tuple[Levels, Levels]:
        """The minimum and maximum possible values of `levels`: [n, blocks]."""
        low, high = ENDS[self.dtype]
        zeros = self._packed.zero_rows(start, stop).astype(np.float32)
        return low - zeros, high - zeros

    def scale_rows(self, start: int, stop: int) -> Floats:
        """The scales of rows [start, stop): [n, blocks]."""
        return self._packed.scale_rows(start, stop)

    def values(self, start: int = 0, stop: int | None = None) -> Floats:
        """Rows [start, stop) as float32."""
        stop = self.shape[0] if stop is None else min(stop, self.shape[0])
        if not self.scaled:
            return to_float32(self.tensor.array()[start:stop], self.dtype)
        return dequantized(self.levels(start, stop), self.scale_rows(start, stop), self.block)


def dequantized(levels: Levels, scales: Floats, block: int) -> Floats:
    """levels [n, in] times scales [n, in / block]."""
    rows, columns = levels.shape
    cut = levels.reshape(rows, columns // block, block).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.asarray((cut * scales[:, :, None]).reshape(rows, columns))


def read(model: Axmodel) -> dict[str, Stored]:
    """All initializers by name. Scales and zero points belong to their matrix and have no entry of their own."""
    made_by = makers(model)
    orders = _orders(model, made_by)
    found: dict[str, Stored] = {}
    others: set[str] = set()
    for node in model.nodes:
        packed = quantised(model, node, made_by)
        if packed is None or packed.levels.dims[1] % packed.block:
            continue
        order = orders.get(node.outputs[0])
        found[packed.levels.name] = Stored(packed.levels.name, packed.levels, packed, order)
        others |= {part.name for part in (*packed.parts[1:], *([order] if order else []))}
    for name, tensor in model.initializers.items():
        if name not in found and name not in others and tensor.dtype in DTYPES:
            found[name] = Stored(name, tensor)
    return found


def _orders(model: Axmodel, made_by: Mapping[str, Node]) -> dict[str, Tensor]:
    """The Gather indices of inputs of MatMuls, by the name of the matrix [out, in]."""
    found: dict[str, Tensor] = {}
    for node in model.nodes:
        if node.op_type != "MatMul":
            continue
        gather, transpose = (made_by.get(name) for name in node.inputs)
        if gather is None or gather.op_type != "Gather" or gather.attributes.get("axis") != -1 or transpose is None:
            continue
        if gather.inputs[1] in model.initializers:
            found[transpose.inputs[0]] = model.initializers[gather.inputs[1]]
    return found

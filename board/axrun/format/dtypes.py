"""Element types of tensors, named as ONNX names them, and the bfloat16 conversions.

bfloat16 is stored as numpy uint16: the upper half of an IEEE float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Dtype(NamedTuple):
    """`onnx`: value of TensorProto.DataType; `bits` per element; `numpy`: the numpy type that stores it."""

    onnx: int
    bits: int
    numpy: str | None


# https://onnx.ai/onnx/repo-docs/IR.html#standard-data-types ; two 4-bit values share a byte, the first in the low half
DTYPES: dict[str, Dtype] = {
    "FLOAT": Dtype(1, 32, "<f4"),
    "UINT8": Dtype(2, 8, "u1"),
    "INT8": Dtype(3, 8, "i1"),
    "UINT16": Dtype(4, 16, "<u2"),
    "INT16": Dtype(5, 16, "<i2"),
    "INT32": Dtype(6, 32, "<i4"),
    "INT64": Dtype(7, 64, "<i8"),
    "BOOL": Dtype(9, 8, "?"),
    "FLOAT16": Dtype(10, 16, "<f2"),
    "DOUBLE": Dtype(11, 64, "<f8"),
    "UINT32": Dtype(12, 32, "<u4"),
    "UINT64": Dtype(13, 64, "<u8"),
    "BFLOAT16": Dtype(16, 16, "<u2"),
    "FLOAT8E4M3FN": Dtype(17, 8, "u1"),
    "FLOAT8E5M2": Dtype(19, 8, "u1"),
    "UINT4": Dtype(21, 4, "u1"),
    "INT4": Dtype(22, 4, "u1"),
}
NAMES: dict[int, str] = {dtype.onnx: name for name, dtype in DTYPES.items()}

# --hidden_state_type and the float weight types, as the vendor spells them
FLOATS = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16"}


def nbytes(dtype: str, dims: tuple[int, ...]) -> int:
    """Bytes of a dense tensor; 4-bit types are rounded up to a whole byte."""
    count = 1
    for dim in dims:
        count *= dim
    return (count * DTYPES[dtype].bits + 7) // 8


def bf16_to_f32(bits: NDArray[np.uint16], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Exact conversion of any shape; `out`, of the same shape, is filled and returned."""
    wide = np.empty(bits.shape, np.uint32) if out is None else out.view(np.uint32)
    np.left_shift(bits, 16, out=wide, dtype=np.uint32)
    return wide.view(np.float32)


def f32_to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounds to nearest, ties to even; a NaN stays a NaN. Any shape."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if nan.any():
        rounded[nan] = (bits[nan] >> np.uint32(16)) | np.uint32(0x0040)
    return rounded.astype(np.uint16)


def to_float32(array: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Values of a FLOAT, FLOAT16 or BFLOAT16 array as float32."""
    return bf16_to_f32(array) if dtype == "BFLOAT16" else array.astype(np.float32)


def from_float32(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """float32 values in the numpy type of a FLOAT, FLOAT16 or BFLOAT16 tensor."""
    return f32_to_bf16(values) if dtype == "BFLOAT16" else values.astype(DTYPES[dtype].numpy)

"""fp8: e4m3 numbers with a scale per block of rows and columns, as published by DeepSeek and Qwen.

https://huggingface.co/docs/transformers/quantization/finegrained_fp8 . No integer type holds them: rows are
float32 products with the scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from axc.checkpoints.quantised.matrix import AGAIN, SCALES, Floats, Matrix, Raw, widened
from axc.checkpoints.settings import AUTO_ROUND, Settings, keys
from axc.stored import StoredTensor
from axrun.errors import BadInput

PACKED = "fp8"
# quantisation of activations and of the KV cache is ignored: they stay 16-bit-class
HARMLESS = keys(
    "quant_method activation_scheme kv_cache_scheme modules_to_not_convert ignored_layers dequantize",
)
TENSORS = ("input_scale", "output_scale", "activation_scale", "weight_scale", "weight_scale_inv")


def _table() -> Floats:
    """The value of each byte: 4 bits of exponent with bias 7, 3 of mantissa, no infinities (OCP OFP8)."""
    byte = np.arange(128)
    exponent, mantissa = byte >> 3, (byte & 7) / 8
    magnitude = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7.0))
    magnitude[127] = np.nan
    return np.concatenate([magnitude, -magnitude]).astype(np.float32)


E4M3 = _table()


@dataclass(frozen=True)
class Scaled:
    """e4m3 bytes [out, in] times scales [rows of blocks, columns of blocks] of `height` x `width` numbers each."""

    data: NDArray[np.uint8]
    scales: Floats
    height: int
    width: int

    def __call__(self, start: int, stop: int) -> Floats:
        values = E4M3[self.data[start:stop]]
        scales = self.scales[np.arange(start, stop) // self.height]
        with np.errstate(over="ignore", invalid="ignore"):  # refused by the reader
            values *= np.repeat(scales, self.width, axis=1)[:, : values.shape[1]]
        return np.asarray(values)

    def group_scales(self, start: int, stop: int) -> Floats:
        return np.asarray(self.scales[np.arange(start, stop) // self.height])

    def group_levels(self, start: int, stop: int) -> NDArray[np.bool_]:
        filled = self.data[start:stop] & 127 != 0
        return np.asarray(np.logical_or.reduceat(filled, np.arange(0, filled.shape[1], self.width), axis=1))


def matrices(settings: Settings, raw: Raw) -> Iterator[Matrix]:
    settings.refuse_unknown((*HARMLESS, *AUTO_ROUND, "fmt", "weight_block_size", "scale_fmt"))
    settings.only("scale_fmt", "float", "ue8m0", absent="float")  # ue8m0: floats that are powers of two
    return read_modules(raw, block(settings))


def block(settings: Settings) -> tuple[int, int] | None:
    """The rows and columns that share a scale; None: all of the matrix, or of a row. Raises BadInput."""
    settings.only("fmt", "e4m3", "float8_e4m3fn", absent="e4m3")
    size = settings.values.get("weight_block_size")
    if size is None:
        return None
    if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and 1 <= n < 1 << 24 for n in size)):
        raise settings.refuse("weight_block_size", "expected two numbers of rows and columns")
    return size[0], size[1]


def read_modules(raw: Raw, block: tuple[int, int] | None) -> Iterator[Matrix]:
    """Every module in fp8. Raises BadInput."""
    for module in raw.modules("weight"):
        weight = raw.tensors[f"{module}.weight"]
        if weight.dtype == "F8_E5M2":
            raise BadInput(f"{weight.file}: {weight.key} is stored as F8_E5M2; expected F8_E4M3\n{AGAIN}")
        if weight.dtype == "F8_E4M3":
            usual = ("weight_scale_inv", "weight_scale") if block else ("weight_scale", "weight_scale_inv")
            suffix = next((name for name in usual if raw.find(module, name)), usual[0])
            yield matrix(raw, module, weight, suffix, block)


def matrix(raw: Raw, module: str, weight: StoredTensor, suffix: str, block: tuple[int, int] | None) -> Matrix:
    """`block`: rows and columns that share a scale; None: one scale for all, or for each row. Raises BadInput."""
    weight = raw.need(module, "weight", ("F8_E4M3",), (None, None))
    rows, columns = weight.shape
    both = [scale for name in ("weight_scale", "weight_scale_inv") if (scale := raw.find(module, name))]
    if len(both) > 1:
        raise BadInput(f"{weight.file}: {both[0].key} and {both[1].key} are both stored; which is meant?\n{AGAIN}")
    found = raw.find(module, suffix)
    if block is None:
        block = (1, columns) if found and found.shape in ((rows, 1), (rows,)) and rows > 1 else (rows, columns)
        shape: Any = found.shape if found and found.shape in ((), (1,), (1, 1), (rows,)) else (rows, 1)
    else:
        shape = (-(-rows // block[0]), -(-columns // block[1]))
    scale = raw.need(module, suffix, SCALES, shape)
    scales = widened(raw.array(scale), scale.dtype).reshape(-(-rows // block[0]), -(-columns // block[1]))
    stored = StoredTensor(f"{module}.weight", "FLOAT", weight.shape, weight.file, weight.key, PACKED)
    return Matrix(stored, Scaled(raw.array(weight), scales, *block))

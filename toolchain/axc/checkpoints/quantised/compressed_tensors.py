"""compressed-tensors, the format of LLM Compressor and vLLM: packed or plain integers, and fp8.

`weight_packed` int32 [out, in * bits / 32] holds levels plus half of their range, the lowest bits first;
`weight_zero_point` is packed the same way along its first dimension. `int-quantized` has int8 `weight`,
`float-quantized` e4m3. value = (level - zero point) * weight_scale. https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from axc.checkpoints.quantised import fp8
from axc.checkpoints.quantised.matrix import (
    AGAIN,
    SCALES,
    Integers,
    Matrix,
    Raw,
    column_groups,
    signed,
    unsigned,
    whole_groups,
    widened,
)
from axc.checkpoints.settings import Settings, keys
from axc.stored import Rows
from axrun.errors import BadInput

NAME = "compressed-tensors"
TENSORS = keys(
    """
    weight_packed weight_scale weight_zero_point weight_shape weight_g_idx input_scale input_zero_point
    output_scale output_zero_point
    """
)
HARMLESS = keys(
    "quant_method provider global_compression_ratio ignore version run_compressed dequantize kv_cache_scheme"
)
INTEGERS = ("pack-quantized", "int-quantized")
FLOATS = ("float-quantized", "naive-quantized")


@dataclass(frozen=True)
class Scheme:
    """How matrices are stored. `group`: columns that share a scale, -1 for all of a row and 0 for all of the matrix.

    `reordered`: groups are out of order, as an index says.
    """

    packed: bool
    bits: int
    symmetric: bool
    group: int
    reordered: bool = False


# rows and columns that share a scale of e4m3 numbers; None: all of the matrix, or of a row
Blocks = tuple[int, int] | None


def matrices(settings: Settings, raw: Raw) -> Iterator[Matrix]:
    read = keys("format quantization_status config_groups sparsity_config transform_config")
    settings.refuse_unknown((*HARMLESS, *read, "moe_sparsity_config"))
    settings.only("quantization_status", "compressed", "frozen", absent="compressed")  # the tensors decide
    for key in ("transform_config", "moe_sparsity_config"):
        settings.only(key, None, {}, absent=None)
    if settings.values.get("sparsity_config"):
        settings.part("sparsity_config", f"{settings.where}.sparsity_config").only("format", "dense")
    groups = settings.part("config_groups", f"{settings.where}.config_groups")
    schemes = [_scheme(groups.part(name, f"config_groups.{name}"), settings) for name in groups.values]
    if not schemes:
        raise settings.refuse("config_groups", "expected ways to store weights")
    blocks = [scheme for scheme in schemes if not isinstance(scheme, Scheme)]
    integers = [scheme for scheme in schemes if isinstance(scheme, Scheme)]
    if any(block != blocks[0] for block in blocks):
        raise settings.refuse("config_groups", "expected fp8 in blocks of one size")
    for module in _modules(raw, "weight", "F8_E4M3") if blocks else []:
        yield fp8.matrix(raw, module, raw.tensors[f"{module}.weight"], "weight_scale", blocks[0])
    for packed in sorted({scheme.packed for scheme in integers}):
        found = [scheme for scheme in integers if scheme.packed == packed]
        for module in raw.modules("weight_packed") if packed else _modules(raw, "weight", "I8"):
            yield _integers(raw, module, _own(raw, module, found))


def _own(raw: Raw, module: str, schemes: list[Scheme]) -> Scheme:
    """The scheme that fits the tensors of a module. Raises BadInput.

    Targets may be regular expressions, which can take exponential time in an untrusted file; shapes are used instead.
    """
    weight = raw.find(module, "weight_packed") or raw.find(module, "weight")
    scale, size = raw.find(module, "weight_scale"), raw.find(module, "weight_shape")
    if len(set(schemes)) == 1 or weight is None or scale is None:
        return schemes[0]
    columns = weight.shape[-1]
    if size is not None:
        columns = int(raw.array(raw.need(module, "weight_shape", ("I64", "I32"), (2,)))[1])
    fits: dict[tuple[int, int], Scheme] = {}
    for scheme in schemes:
        block = columns if scheme.group < 1 else min(scheme.group, columns)
        shape = (1,) if scheme.group == 0 else (weight.shape[0], -(-columns // max(block, 1)))
        wide = -(-columns * scheme.bits // 32) if scheme.packed else columns
        same = scheme.symmetric == (raw.find(module, "weight_zero_point") is None)
        if scale.shape == shape and weight.shape[-1] == wide and same:
            fits.setdefault((scheme.bits, block), scheme)
    if len(fits) != 1:
        seen = "several" if fits else "none"
        raise BadInput(
            f"{weight.file}: {seen} of the config_groups fit {module} by bits, groups and zero points\n{AGAIN}"
        )
    return next(iter(fits.values()))


def _modules(raw: Raw, suffix: str, dtype: str) -> list[str]:
    return [module for module in raw.modules(suffix) if raw.tensors[f"{module}.{suffix}"].dtype == dtype]


def _scheme(group: Settings, whole: Settings) -> Scheme | Blocks:
    """The scheme of an entry of config_groups. Quantisation of activations is ignored: they stay 16-bit-class."""
    group.refuse_unknown(("targets", "weights", "input_activations", "output_activations", "format"))
    group.only("output_activations", None, {}, absent=None)
    weights = group.part("weights", f"{group.where}.weights")
    known = "num_bits type symmetric group_size strategy block_structure dynamic actorder observer observer_kwargs"
    weights.refuse_unknown((*keys(known), "scale_dtype", "zp_dtype"))
    weights.only("dynamic", False, absent=False)
    size = weights.values.get("group_size")
    usual = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = weights.only("strategy", "group", "channel", "tensor", "block", absent=usual)
    named = group if group.values.get("format") is not None else whole
    if weights.only("type", "int", "float", absent="int") == "float":
        named.only("format", *FLOATS)
        weights.only("num_bits", 8)
        weights.only("strategy", "block", "channel", "tensor", absent=usual)
        block = weights.values.get("block_structure")
        if strategy != "block":
            return None
        if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and 0 < n < 1 << 24 for n in block)):
            raise weights.refuse("block_structure", "expected two numbers of rows and columns")
        return block[0], block[1]
    named.only("format", *INTEGERS)
    packed = named.values["format"] == "pack-quantized"
    weights.only("strategy", "group", "channel", "tensor", absent=usual)
    columns = {"channel": -1, "tensor": 0}.get(strategy) if strategy != "group" else weights.group_size()
    bits = weights.only("num_bits", *((4, 8) if packed else (8,)))
    assert columns is not None
    # "group" stores an index; "weight" and "static" only changed the order in which columns were quantised
    order = weights.only("actorder", "group", "weight", "static", True, False, None, absent=None)
    return Scheme(packed, bits, weights.flag("symmetric", True), columns, order in ("group", True))


def _integers(raw: Raw, module: str, scheme: Scheme) -> Matrix:
    if scheme.packed:
        weight = raw.need(module, "weight_packed", ("I32",), (None, None))
        shape = raw.need(module, "weight_shape", ("I64", "I32"), (2,))
        rows, columns = (int(size) for size in raw.array(shape))
        if (rows, -(-columns * scheme.bits // 32)) != weight.shape:
            raise BadInput(
                f"{weight.file}: {weight.key} has shape {list(weight.shape)}, which {[rows, columns]} numbers of "
                f"{scheme.bits} bits do not have\n{AGAIN}"
            )
    else:
        weight = raw.need(module, "weight", ("I8",), (None, None))
        rows, columns = weight.shape
    block = columns if scheme.group < 1 else min(scheme.group, columns)
    count = -(-columns // block)
    scale = raw.need(module, "weight_scale", SCALES, (1,) if scheme.group == 0 else (rows, count))
    whole_groups(weight, columns, block)
    groups = None
    if scheme.reordered or raw.find(module, "weight_g_idx") or raw.modules("weight_g_idx"):  # all have one, or none
        index = raw.need(module, "weight_g_idx", ("I32", "I64"), (columns,))
        if (raw.array(index) != -1).any():  # how it is initialised
            groups = column_groups(index.file, index.key, raw.array(index), count, block)
    integers = Integers(
        name=module,
        file=weight.file,
        codes=Codes(raw.array(weight), scheme.bits, columns),
        scales=Repeated(widened(raw.array(scale), scale.dtype).reshape(-1, count), rows),
        zeros=_zeros(raw, module, scheme, rows, count),
        block=block,
        groups=groups,
        symmetric=scheme.symmetric,
    )
    return integers.matrix(weight, (rows, columns), scheme.bits, scale.dtype, f"{NAME} int{scheme.bits}")


def _zeros(raw: Raw, module: str, scheme: Scheme, rows: int, count: int) -> Rows | None:
    """Zero points int8 [n, groups]; None if a symmetric matrix has none."""
    suffix = "weight_zero_point"
    found = raw.find(module, suffix)
    if found is None and scheme.symmetric:
        return None
    if found is None or found.dtype == "I8":  # older versions did not pack them
        stored = raw.need(module, suffix, ("I8",), (1,) if scheme.group == 0 else (rows, count))
        zeros, half = raw.array(stored), 1 << (scheme.bits - 1)
        if zeros.min() < -half or zeros.max() >= half:
            raise BadInput(
                f"{stored.file}: {stored.key} holds zero points from {zeros.min()} to {zeros.max()}; "
                f"{scheme.bits} bits hold {-half} to {half - 1}\n{AGAIN}"
            )
        return Repeated(zeros.reshape(-1, count), rows)
    stored = raw.need(module, suffix, ("I32",), (-(-rows * scheme.bits // 32), count))
    codes = unsigned(np.ascontiguousarray(raw.array(stored).T), scheme.bits)[:, :rows]
    return Repeated(signed(np.ascontiguousarray(codes.T), scheme.bits), rows)


@dataclass(frozen=True)
class Codes:
    """Levels of rows [n, columns]."""

    array: NDArray[Any]
    bits: int
    columns: int

    def __call__(self, start: int, stop: int) -> NDArray[np.int8]:
        rows = self.array[start:stop]
        if rows.dtype == np.int8:
            return np.ascontiguousarray(rows)
        return signed(np.ascontiguousarray(unsigned(rows, self.bits)[:, : self.columns]), self.bits)


@dataclass(frozen=True)
class Repeated:
    """Rows [n, groups], or one row repeated `rows` times."""

    array: NDArray[Any]
    rows: int

    def __call__(self, start: int, stop: int) -> NDArray[Any]:
        if len(self.array) == self.rows:
            return np.ascontiguousarray(self.array[start:stop])
        return np.repeat(self.array, stop - start, axis=0)

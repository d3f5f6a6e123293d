"""GPTQ: 32-bit words along the columns of a transposed matrix, with fp16 scales and zero points per group of columns.

`qweight` [in / 8, out] holds eight 4-bit (or four 8-bit) codes of a column in each word, the lowest bits first;
`scales` [groups, out], `qzeros` [groups, out / 8], `g_idx` [in]: value = scale * (code - zero point). The format `gptq`
stores zero points minus 1; the 1 is added to whole words, as in GPTQModel. `gptq_v2` stores them unchanged.
With desc_act `g_idx` is not in order. https://github.com/ModelCloud/GPTQModel
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from axc.checkpoints.quantised.matrix import (
    AGAIN,
    SCALES,
    Columns,
    Integers,
    Matrix,
    Raw,
    column_groups,
    signed,
    staircase,
    unsigned,
    whole_groups,
    widened,
)
from axc.checkpoints.settings import AUTO_ROUND, Settings, keys
from axc.stored import StoredTensor
from axrun.errors import BadInput

NAME = "GPTQ"
TENSORS = ("qweight", "qzeros", "scales", "g_idx")
# how the checkpoint was made, and options of programs that run it
HARMLESS = keys(
    """
    quant_method method meta quantizer damp_percent damp_auto_increment static_groups true_sequential act_group_aware
    mse failsafe model_name_or_path model_file_base_name dataset tokenizer module_name_preceding_first_block
    block_name_to_quantize modules_in_block_to_quantize modules_to_not_convert batch_size pad_token_id use_exllama
    disable_exllama exllama_config max_input_length use_cuda_fp16 model_seqlen cache_block_outputs backend lm_head
    nsamples version offload_to_disk offload_to_disk_path vram_strategy hessian gptaq is_sequential
    """
)


@dataclass(frozen=True)
class Packing:
    """The packing of the tensors. `shift` is added to each stored zero point.

    `desc_act`: whether groups of columns are out of order; None: `g_idx` decides. `others`: bits and group sizes
    of some modules. The shapes of a module's tensors decide: config.json names modules by regular expressions, which
    can take exponential time in an untrusted file.
    """

    name: str
    bits: int
    group_size: int
    symmetric: bool
    shift: int
    desc_act: bool | None = None
    others: tuple[tuple[int, int], ...] = ()


def matrices(settings: Settings, raw: Raw) -> Iterator[Matrix]:
    read = (
        "bits",
        "group_size",
        "sym",
        "desc_act",
        "checkpoint_format",
        "format",
        "pack_dtype",
        "dynamic",
        "is_marlin_format",
    )
    settings.refuse_unknown((*HARMLESS, *AUTO_ROUND, "data_type", "act_bits", *read))
    settings.only("data_type", "int", absent="int")
    settings.only("act_bits", 16, 32, absent=16)
    settings.only("is_marlin_format", False, absent=False)
    settings.only("pack_dtype", "int32", absent="int32")
    key = "checkpoint_format" if settings.values.get("checkpoint_format") is not None else "format"
    layout = settings.only(key, "gptq", "gptq_v2", absent="gptq")
    usual = settings.only("bits", 4, 8), settings.group_size()
    rules = settings.values.get("dynamic") or {}
    if not isinstance(rules, dict):
        raise settings.refuse("dynamic", "expected an object")
    changes = [own for rule, own in rules.items() if not str(rule).startswith("-:")]  # those stay floats
    others, symmetric = overrides(settings, "dynamic", changes)
    desc_act = None if changes else settings.only("desc_act", True, False, None)
    packing = Packing(NAME, *usual, symmetric, int(layout == "gptq"), desc_act, others)
    return read_modules(raw, packing)


def overrides(settings: Settings, key: str, changes: list[Any]) -> tuple[tuple[tuple[int, int], ...], bool]:
    """Bits and group sizes that some modules have instead of the usual, and whether all are symmetric.

    `changes` are objects of the key. Raises BadInput.
    """
    others, symmetric = [], settings.flag("sym", True)
    for change in changes:
        if not isinstance(change, dict):
            raise settings.refuse(key, "expected objects in it")
        own = Settings({**settings.values, **change}, settings.path, f"{settings.where}.{key}", settings.advice)
        if own.values.get("bits") in (16, 32):  # floats
            continue
        own.refuse_unknown(
            (*settings.values, *AUTO_ROUND, "bits", "group_size", "sym", "desc_act", "data_type", "act_bits")
        )
        own.only("data_type", "int", absent="int")
        own.only("act_bits", 16, 32, absent=16)
        others.append((own.only("bits", 4, 8), own.group_size()))
        symmetric &= own.flag("sym", True)
    return tuple(others), symmetric


def read_modules(raw: Raw, packing: Packing) -> Iterator[Matrix]:
    """Every module with this packing. Raises BadInput."""
    for module in raw.modules("qweight"):
        yield _matrix(raw, module, packing)


def _own(raw: Raw, module: str, packing: Packing) -> Packing:
    """The packing with the bits and group size that fit the tensors of a module. Raises BadInput."""
    weight, scale, zero = (raw.find(module, suffix) for suffix in ("qweight", "scales", "qzeros"))
    if not packing.others or not (weight and scale and zero and len(weight.shape) == len(scale.shape) == 2):
        return packing
    fits: dict[tuple[int, int], Packing] = {}
    for bits, size in ((packing.bits, packing.group_size), *packing.others):
        columns, rows = weight.shape[0] * 32 // bits, weight.shape[1]
        block = columns if size == -1 else min(size, columns)
        count = -(-columns // max(block, 1))
        if scale.shape == (count, rows) and zero.shape == (count, -(-rows * bits // 32)):
            fits.setdefault((bits, block), replace(packing, bits=bits, group_size=block))
    if len(fits) > 1:
        sizes = " or ".join(f"{bits} bits in groups of {block}" for bits, block in fits)
        raise BadInput(f"{weight.file}: {module} could have {sizes}; config.json names both\n{AGAIN}")
    return next(iter(fits.values()), packing)


def _matrix(raw: Raw, module: str, packing: Packing) -> Matrix:
    packing = _own(raw, module, packing)
    each = 32 // packing.bits
    weight = raw.need(module, "qweight", ("I32",), (None, None))
    columns, rows = weight.shape[0] * each, weight.shape[1]
    block = columns if packing.group_size == -1 else min(packing.group_size, columns)
    count = -(-columns // block)
    scale = raw.need(module, "scales", SCALES, (count, rows))
    zero = raw.need(module, "qzeros", ("I32",), (count, -(-rows // each)))
    groups = None
    if raw.find(module, "g_idx") or (packing.desc_act and count > 1):
        index = raw.need(module, "g_idx", ("I32", "I64"), (columns,))
        groups = column_groups(index.file, index.key, raw.array(index), count, block)
        ordered = groups is None or np.array_equal(groups, staircase(columns, block))
        if packing.desc_act is False and not ordered:
            raise BadInput(
                f"{index.file}: {index.key} has groups out of order; config.json says desc_act false, with which some "
                f"programs ignore it\n{AGAIN}"
            )
    else:
        whole_groups(weight, columns, block)
    integers = Integers(
        name=module,
        file=weight.file,
        codes=Codes(Columns(raw.array(weight)), packing.bits),
        scales=scale_rows(raw, scale),
        zeros=Zeros(raw.array(zero), packing.bits, packing.shift),
        block=block,
        groups=groups,
        symmetric=packing.symmetric,
    )
    kind = f"{packing.name} {packing.bits}-bit"
    return integers.matrix(weight, (rows, columns), packing.bits, scale.dtype, kind)


@dataclass(frozen=True)
class Codes:
    """Levels of rows of the matrix, which are columns of the packed one."""

    words: Columns
    bits: int

    def __call__(self, start: int, stop: int) -> NDArray[np.int8]:
        return signed(unsigned(self.words(start, stop), self.bits), self.bits)


@dataclass(frozen=True)
class Zeros:
    """Zero points [n, groups] from words [groups, out / 8], offset by half of the range of codes like levels."""

    words: NDArray[np.int32]
    bits: int
    shift: int

    def __call__(self, start: int, stop: int) -> NDArray[np.int8]:
        return np.ascontiguousarray(self._all[start:stop])

    @functools.cached_property
    def _all(self) -> NDArray[np.int8]:
        ones = 0x11111111 if self.bits == 4 else 0x01010101
        words = np.ascontiguousarray(self.words).view(np.uint32) + np.uint32(self.shift * ones)
        return signed(unsigned(words.view(np.int32), self.bits), self.bits).T


def scale_rows(raw: Raw, stored: StoredTensor) -> Callable[[int, int], NDArray[np.float32]]:
    """Scales [n, groups] of rows, stored as [groups, out]."""
    array = Columns(raw.array(stored))
    return lambda start, stop: widened(array(start, stop), stored.dtype)

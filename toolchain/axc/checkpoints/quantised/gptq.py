"""GPTQ: words of 32 bits along the columns of a transposed matrix, fp16 scales and zero points for groups of columns.

`qweight` [in / 8, out] holds eight 4-bit (or four 8-bit) codes of a column in each word, the lowest bits first;
`scales` [groups, out], `qzeros` [groups, out / 8], `g_idx` [in]: value = scale * (code - zero point). The format `gptq`
stores zero points less one, added to whole words as GPTQModel does it; `gptq_v2` stores them as they are. With desc_act
`g_idx` is no staircase. https://github.com/ModelCloud/GPTQModel
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

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
from axc.checkpoints.stored import StoredTensor
from axrun.errors import BadInput

NAME = "GPTQ"
TENSORS = ("qweight", "qzeros", "scales", "g_idx")
# how it was made, and how programs run it
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
    """What the tensors mean. `shift`: added to each zero point that is stored.

    `desc_act`: whether groups of columns are out of order; None: what is stored decides.
    """

    name: str
    bits: int
    group_size: int
    symmetric: bool
    shift: int
    desc_act: bool | None = None


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
    dynamic = settings.values.get("dynamic")
    if dynamic and not (isinstance(dynamic, dict) and all(str(rule).startswith("-:") for rule in dynamic)):
        raise settings.refuse("dynamic", "modules of other bits or groups are not read")
    bits = settings.only("bits", 4, 8)
    desc_act = settings.only("desc_act", True, False, None)
    symmetric, shift = settings.flag("sym", True), int(layout == "gptq")
    packing = Packing(NAME, bits, settings.group_size(), symmetric, shift, desc_act)
    return read_modules(raw, packing)


def read_modules(raw: Raw, packing: Packing) -> Iterator[Matrix]:
    """Every module that is packed so. Raises BadInput."""
    for module in raw.modules("qweight"):
        yield _matrix(raw, module, packing)


def _matrix(raw: Raw, module: str, packing: Packing) -> Matrix:
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
    """Zero points [n, groups] of words [groups, out / 8], as levels are: less half of the range of codes."""

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

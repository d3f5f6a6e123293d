"""AWQ, packing `gemm`: 32-bit words along the rows of a transposed matrix, with eight interleaved codes each.

`qweight` [in, out / 8], `qzeros` [groups, out / 8], `scales` [groups, out]: value = scale * (code - zero point). A word
holds the codes of rows 0, 2, 4, 6, 1, 3, 5, 7, the lowest bits first. https://github.com/casper-hansen/AutoAWQ
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from axc.checkpoints.quantised.gptq import scale_rows
from axc.checkpoints.quantised.matrix import SCALES, Columns, Integers, Matrix, Raw, signed, unsigned, whole_groups
from axc.checkpoints.settings import AUTO_ROUND, Settings, keys

NAME, BITS, EACH = "AWQ", 4, 8
HARMLESS = keys(
    """
    quant_method method meta quantizer modules_to_not_convert backend do_fuse fuse_max_seq_len modules_to_fuse
    exllama_config lm_head model_name_or_path model_file_base_name damp_percent true_sequential static_groups desc_act
    """
)
# position in a word of each row's code
PLACES = np.array([0, 4, 1, 5, 2, 6, 3, 7])


def matrices(settings: Settings, raw: Raw) -> Iterator[Matrix]:
    read = ("bits", "group_size", "zero_point", "version", "format", "checkpoint_format", "pack_dtype", "sym")
    settings.refuse_unknown((*HARMLESS, *AUTO_ROUND, "data_type", "act_bits", *read))
    settings.only("data_type", "int", absent="int")
    settings.only("act_bits", 16, 32, absent=16)
    for key in ("version", "format", "checkpoint_format"):
        settings.only(key, "gemm", "GEMM", absent="gemm")
    settings.only("pack_dtype", "int32", absent="int32")
    settings.only("backend", "autoawq", "auto", absent="autoawq")
    settings.only("bits", BITS)
    settings.flag("zero_point", True)
    return read_modules(raw, settings.group_size(), settings.flag("sym", False))


def read_modules(raw: Raw, group_size: int, symmetric: bool, name: str = NAME) -> Iterator[Matrix]:
    """Every module with this packing. Raises BadInput."""
    for module in raw.modules("qweight"):
        weight = raw.need(module, "qweight", ("I32",), (None, None))
        columns, rows = weight.shape[0], weight.shape[1] * EACH
        block = columns if group_size == -1 else min(group_size, columns)
        whole_groups(weight, columns, block)
        count = columns // block
        scale = raw.need(module, "scales", SCALES, (count, rows))
        zero = raw.need(module, "qzeros", ("I32",), (count, weight.shape[1]))
        integers = Integers(
            name=module,
            file=weight.file,
            codes=Interleaved(Columns(raw.array(weight))),
            scales=scale_rows(raw, scale),
            zeros=Interleaved(Columns(raw.array(zero))),
            block=block,
            symmetric=symmetric,
        )
        yield integers.matrix(weight, (rows, columns), BITS, scale.dtype, f"{name} {BITS}-bit")


@dataclass(frozen=True)
class Interleaved:
    """Levels of rows, eight rows per word."""

    words: Columns

    def __call__(self, start: int, stop: int) -> NDArray[np.int8]:
        first = start // EACH
        words = self.words(first, -(-stop // EACH))
        codes = unsigned(words, BITS).reshape(len(words), -1, EACH)[:, :, PLACES]
        rows = codes.transpose(0, 2, 1).reshape(len(words) * EACH, -1)
        return signed(np.ascontiguousarray(rows[start - first * EACH : stop - first * EACH]), BITS)

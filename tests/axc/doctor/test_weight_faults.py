"""Causes of weight differences: each fault in every applicable type, and no finding without a fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from axc.doctor import weight_faults
from axc.doctor.stored import Stored
from axc.quantizer import WEIGHT_TYPES, SquaredError
from axc.quantizer.kept import Kept
from axrun.format.axmodel import Tensor
from axrun.format.dtypes import from_float32
from axrun.format.quantised import Quantised

ROWS, COLUMNS, HEAD = 64, 64, 16
DTYPES = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16", "s8": "INT8", "s4": "INT4"}
DTYPES |= {"fp8_e4m3": "FLOAT8E4M3FN", "fp8_e5m2": "FLOAT8E5M2"}
TYPES = tuple(DTYPES)
RANDOM = np.random.default_rng(0)
WEIGHTS = {
    "w": RANDOM.normal(0, 0.1, (ROWS, COLUMNS)).astype(np.float32),
    "other": RANDOM.normal(0, 0.1, (ROWS, COLUMNS)).astype(np.float32),
}
Floats = Any


def packed(kind: str, values: Floats) -> list[Any]:
    """The arrays of a weight as a build writes them."""
    return [array.copy() for array in WEIGHT_TYPES[kind].store(values, "FLOAT", SquaredError())]


def stored(kind: str, arrays: list[Any]) -> Stored:
    """As it is read from a file."""
    weight = WEIGHT_TYPES[kind]
    parts = weight.parts("w", ROWS, COLUMNS)
    tensors = [
        Tensor(name, dtype, dims, 0, array.nbytes, memoryview(np.ascontiguousarray(array).tobytes()))
        for (name, dtype, dims), array in zip(parts, arrays, strict=True)
    ]
    if len(tensors) == 1:
        return Stored("w", tensors[0])
    packed = Quantised(tensors[0], tensors[1], None, weight.dequantize(COLUMNS).get("block_size", COLUMNS))
    return Stored("w", tensors[0], packed)


def cause(kind: str, arrays: list[Any], head_dim: int = 0) -> str:
    """What is said of it; empty where nothing is."""
    return explained(stored(kind, arrays), head_dim)


def explained(entry: Stored, head_dim: int = 0) -> str:
    bad = weight_faults.compare(entry, "w", lambda name, start, stop: WEIGHTS[name][start:stop])
    if bad is None:
        return ""
    fault = weight_faults.explain(entry, "w", *bad, WEIGHTS.__getitem__, {"other": "up_proj"}, head_dim)
    return fault.text


def interleaved(values: Floats) -> Floats:
    return values.reshape(-1, 2, HEAD // 2, COLUMNS).transpose(0, 2, 1, 3).reshape(values.shape)


def test_zero_points() -> None:
    """As the common asymmetric formats round: values and 0 mapped to the whole range of levels."""
    rows, block = WEIGHTS["w"].reshape(ROWS, -1, 32), 32
    low, high = np.minimum(rows.min(axis=2), 0), np.maximum(rows.max(axis=2), 0)
    scales = ((high - low) / 15).astype(np.float16)
    zeros = np.clip(np.rint(-low / scales), 0, 15)
    levels = np.clip(np.rint(rows / scales[:, :, None]) + zeros[:, :, None], 0, 15).reshape(ROWS, COLUMNS)

    def said(levels: Floats, zeros: Floats) -> str:
        kept = Kept("INT4", block, "w", "test", "FLOAT16", True)
        arrays = [array.astype(np.int8) - np.int8(8) for array in (levels, zeros)]
        first, second, third = kept.write(arrays[0], scales.astype(np.float32), arrays[1])
        data = (first, second, *kept.finish(2, [third]))
        parts = [
            Tensor(name, dtype, dims, 0, array.nbytes, memoryview(array.tobytes()))
            for (name, dtype, dims), array in zip(kept.parts("w", ROWS, COLUMNS), data, strict=True)
        ]
        entry = Stored("w", parts[0], Quantised(parts[0], parts[1], parts[2], block))
        return explained(entry)

    assert said(levels, zeros) == ""
    other = levels.copy()
    other[5, 7] = 15 - other[5, 7]
    assert "row 5" in said(other, zeros)
    assert said(levels, np.full_like(zeros, 8))  # zero points of a symmetric format


# what is stored in place of the weight, and what is said of it
ORDERS: dict[str, tuple[Callable[[Floats], Floats], str]] = {
    "transposed": (lambda w: w.T, "it is transposed"),
    "another tensor": (lambda w: WEIGHTS["other"], "it holds up_proj"),
    "rotary": (interleaved, "interleaved for rotary embedding, as GGUF"),
    "zeroed": (lambda w: w * 0, "all values are zero"),
    "sign": (lambda w: -w, "its sign is flipped"),
    "scaled": (lambda w: w * 2, "2"),
    "shifted": (lambda w: np.roll(w, 3, axis=0), "its rows are shifted by 3: row 0 holds row 61"),
    "columns": (lambda w: np.roll(w, 2, axis=1), "its columns are shifted by 2"),
    "upside down": (lambda w: w[::-1], "its rows are in the opposite order"),
    "permuted": (lambda w: w[np.random.default_rng(1).permutation(ROWS)], "its rows are in another order: row"),
    "others": (lambda w: RANDOM.normal(0, 0.1, w.shape).astype(np.float32), "all values differ"),
}


@pytest.mark.parametrize("kind", TYPES)
def test_weights_of_a_build_have_no_faults(kind: str) -> None:
    assert cause(kind, packed(kind, WEIGHTS["w"])) == ""


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", ORDERS)
def test_other_values_in_place_of_a_weight(kind: str, name: str) -> None:
    change, said = ORDERS[name]
    arrays = packed(kind, np.ascontiguousarray(change(WEIGHTS["w"])))
    assert said in cause(kind, arrays, HEAD if name == "rotary" else 0)


@pytest.mark.parametrize("kind", ["s8", "s4"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda scales: np.roll(scales, 1, axis=0), "its scales are shifted by 1 row"),
        (lambda scales: scales.byteswap(), "the byte order of its scales is swapped"),
        (lambda scales: scales * np.float32(1.5), "all scales here are 1.5"),
        (lambda scales: scales * (np.arange(len(scales)) != 9).reshape(-1, *[1] * (scales.ndim - 1)), "row 9"),
        (
            lambda scales: (
                scales * np.where(np.arange(len(scales)) == 5, 1.25, 1).reshape(-1, *[1] * (scales.ndim - 1))
            ),
            "row 5: ",
        ),
    ],
    ids=["shifted", "byte order", "all", "zero", "one row"],
)
def test_scales(kind: str, change: Callable[[Floats], Floats], said: str) -> None:
    levels, scales = packed(kind, WEIGHTS["w"])
    assert said in cause(kind, [levels, change(scales).astype(np.float32)]).replace("1.49", "1.5").replace(
        "1.51", "1.5"
    )


def test_a_scale_off_by_one_percent() -> None:
    levels, scales = packed("s8", WEIGHTS["w"])
    scales[7] *= np.float32(1.01)
    assert "row 7" in cause("s8", [levels, scales])


def test_quantised_values_truncated_instead_of_rounded() -> None:
    _, scales = packed("s8", WEIGHTS["w"])
    cut = np.trunc(WEIGHTS["w"] / scales[:, None]).astype(np.int8)
    assert "truncated towards zero" in cause("s8", [cut, scales])


def test_quantised_values_with_an_offset() -> None:
    levels, scales = packed("s8", WEIGHTS["w"])
    assert "unsigned with an offset" in cause("s8", [(levels.view(np.uint8) ^ np.uint8(128)).view(np.int8), scales])


def test_swapped_halves_of_a_byte() -> None:
    levels, scales = packed("s4", WEIGHTS["w"])
    assert "nibbles of each byte are swapped" in cause("s4", [levels >> 4 | (levels & 15) << 4, scales])


@pytest.mark.parametrize("kind", ["s8"])
def test_quantised_values_transposed_without_their_scales(kind: str) -> None:
    levels, scales = packed(kind, WEIGHTS["w"])
    assert "its scales are in the right order" in cause(kind, [np.ascontiguousarray(levels.T), scales])


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16"])
def test_byte_order(kind: str) -> None:
    assert "byte order is swapped" in cause(kind, [packed(kind, WEIGHTS["w"])[0].byteswap()])


def test_bfloat16_truncated_instead_of_rounded() -> None:
    cut = (WEIGHTS["w"].view(np.uint32) >> 16).astype(np.uint16)
    assert "truncated to bfloat16 instead of rounded" in cause("bf16", [cut])


def test_float32_rounded_to_another_type() -> None:
    narrow = from_float32(WEIGHTS["w"], "FLOAT16").astype(np.float32)
    assert "rounded to FLOAT16 before" in cause("fp32", [narrow])


def test_float16_labelled_as_bfloat16() -> None:
    half = WEIGHTS["w"].astype(np.float16).view(np.uint16)
    assert "the data is float16" in cause("bf16", [half])


@pytest.mark.parametrize("kind", TYPES)
def test_one_row_replaced_by_another(kind: str) -> None:
    wrong = WEIGHTS["w"].copy()
    wrong[11] = wrong[40]
    assert cause(kind, packed(kind, wrong)) == "w, row 11: row 11 holds row 40 of the checkpoint"


def test_one_flipped_bit() -> None:
    values = packed("bf16", WEIGHTS["w"])[0]
    values[3, 4] ^= 1
    assert cause("bf16", [values]).startswith("w, row 3: one value differs")

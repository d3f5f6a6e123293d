"""Faults that a buggy compiler could make in the weights (embedding, layers, head); the manifest matches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from safetensors.numpy import load_file

from tests.doctor.axmodels import edit, get, initializer, layer, post, put, replace
from tests.doctor.fault import Fault
from tests.doctor.file_faults import TABLE

Plant = Callable[[Path, Path], None]
Values = Any  # an array
GATE, UP, DOWN = "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"
Q, K, V, O = (f"self_attn.{name}_proj.weight" for name in "qkvo")  # noqa: E741
HEAD = "lm_head.weight"
NORM, SECOND_NORM = "input_layernorm.weight", "post_attention_layernorm.weight"
EARLY = "files|versions|layers"


def in_layer(change: Callable[[onnx.ModelProto], object], index: int = 1) -> Plant:
    """Changes the axmodel of one layer."""
    return lambda bundle, checkpoint: edit(bundle, layer(bundle, index), lambda model: (change(model), None)[1])


def in_post(change: Callable[[onnx.ModelProto], object]) -> Plant:
    return lambda bundle, checkpoint: edit(bundle, post(bundle), lambda model: (change(model), None)[1])


def values(name: str, change: Callable[[Values], Values]) -> Callable[[onnx.ModelProto], None]:
    """Changes one initializer."""
    return lambda model: put(model, name, change(get(model, name)))


def scale_row(name: str, row: int, factor: float) -> Callable[[onnx.ModelProto], None]:
    def change(scales: Values) -> Values:
        scales[row] *= factor
        return scales

    return values(name + "_scale", change)


def zero_row(name: str, row: int) -> Callable[[onnx.ModelProto], None]:
    def change(matrix: Values) -> Values:
        matrix[row] = 0
        return matrix

    return values(name, change)


def to_nothing(name: str, row: int, factor: float = 1000.0) -> Callable[[onnx.ModelProto], None]:
    """A scale so large that all levels of the row round to zero."""

    def change(model: onnx.ModelProto) -> None:
        levels, scales = get(model, name), get(model, name + "_scale")
        levels.reshape(len(scales), -1)[row] = 0
        scales[row] *= factor
        put(model, name, levels)
        put(model, name + "_scale", scales)

    return change


def exchange(one: str, other: str) -> Callable[[onnx.ModelProto], None]:
    """Swaps two tensors, with their scales if any."""

    def change(model: onnx.ModelProto) -> None:
        for suffix in ("", "_scale"):
            if any(tensor.name.endswith(one + suffix) for tensor in model.graph.initializer):
                first, second = get(model, one + suffix), get(model, other + suffix)
                put(model, one + suffix, second)
                put(model, other + suffix, first)

    return change


def exchange_layers(bundle: Path, checkpoint: Path) -> None:
    """Swaps the weights of layers 1 and 2."""
    files = [layer(bundle, index) for index in (1, 2)]
    first, second = (onnx.load(bundle / file) for file in files)
    edit(bundle, files[0], lambda model: _take(model, second))
    edit(bundle, files[1], lambda model: _take(model, first))


def repeat_a_layer(bundle: Path, checkpoint: Path) -> None:
    """Layer 1 has the weights of layer 0."""
    source = onnx.load(bundle / layer(bundle, 0))
    edit(bundle, layer(bundle, 1), lambda model: _take(model, source))


def _take(model: onnx.ModelProto, source: onnx.ModelProto) -> None:
    for tensor in source.graph.initializer:
        if tensor.name.startswith("model.layers."):
            ending = tensor.name.split(".", 3)[3]
            initializer(model, "." + ending).raw_data = tensor.raw_data


def heads(count: int, order: Callable[[Values], Values]) -> Callable[[Values], Values]:
    """Changes the order of rows inside each of `count` heads: `order` gets [count, head_dim, in]."""
    return lambda matrix: order(matrix.reshape(count, -1, matrix.shape[1])).reshape(matrix.shape)


def as_gguf(rows: Values) -> Values:
    """Interleaves the halves of each head of q and k, like llama.cpp's converter."""
    count, size, width = rows.shape
    return rows.reshape(count, 2, size // 2, width).swapaxes(1, 2)


def permute_as_gguf(model: onnx.ModelProto) -> None:
    put(model, Q, heads(4, as_gguf)(get(model, Q)))
    put(model, K, heads(2, as_gguf)(get(model, K)))


def tile_heads(model: onnx.ModelProto) -> None:
    """Query heads 0 1 2 3 use K/V heads 0 1 0 1 instead of 0 0 1 1."""
    order = [0, 2, 1, 3]
    put(model, Q, get(model, Q).reshape(4, 32, -1)[order].reshape(128, -1))
    put(model, O, get(model, O).reshape(-1, 4, 32)[:, order].reshape(-1, 128))


def overflow(model: onnx.ModelProto) -> None:
    """The factors fit float16, but not their product with the rest."""
    for name in (GATE, UP):
        put(model, name, (get(model, name).astype(np.float32) * 2000).astype(np.float16))


def shift_table(bundle: Path, checkpoint: Path) -> None:
    table(lambda rows: np.roll(rows, 1, axis=0))(bundle, checkpoint)


def table(change: Callable[[Values], Values]) -> Plant:
    """Changes the embedding [vocab, 128]: bfloat16 values as uint16."""

    def plant(bundle: Path, checkpoint: Path) -> None:
        rows = np.frombuffer((bundle / TABLE).read_bytes(), "<u2").reshape(-1, 128).copy()
        replace(bundle, TABLE, np.ascontiguousarray(change(rows), "<u2").tobytes())

    return plant


def truncated_table(bundle: Path, checkpoint: Path) -> None:
    """The upper halves of the checkpoint's float32 values: truncated instead of rounded."""
    stored = load_file(checkpoint / "model.safetensors")["model.embed_tokens.weight"]
    replace(bundle, TABLE, (stored.view(np.uint32) >> 16).astype("<u2").tobytes())


def half_table(bundle: Path, checkpoint: Path) -> None:
    """float16 instead of bfloat16."""
    stored = load_file(checkpoint / "model.safetensors")["model.embed_tokens.weight"]
    replace(bundle, TABLE, stored.astype("<f2").tobytes())


def head_for_table(bundle: Path, checkpoint: Path) -> None:
    stored = load_file(checkpoint / "model.safetensors")[HEAD]
    bits = stored.view(np.uint32)
    replace(bundle, TABLE, ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes())


def tied_head(bundle: Path, checkpoint: Path) -> None:
    stored = load_file(checkpoint / "model.safetensors")["model.embed_tokens.weight"]
    edit(bundle, post(bundle), lambda model: put(model, HEAD, stored))


def set_row(rows: Values, row: int, value: int) -> Values:
    rows[row] = value
    return rows


def flip_a_sign(rows: Values) -> Values:
    rows[613, 77] ^= 0x8000
    return rows


def embedding() -> list[Fault]:
    def rows(name: str, plant: Plant, base: str = "s8", says: str = "") -> Fault:
        return Fault(name, base, "embedding", TABLE, plant, says=says)

    return [
        rows("the rows are shifted by one", shift_table, says="shift|row"),
        rows("bfloat16 was truncated", truncated_table, "llama", "truncat|round"),
        rows("the bytes are swapped", table(lambda rows: rows.byteswap()), says="byte|endian|order"),
        rows("one row is zero", table(lambda rows: set_row(rows, 411, 0)), says="411|zero|row"),
        rows("one value has a flipped sign", table(flip_a_sign), says="613|row"),
        rows("float16 instead of bfloat16", half_table, "llama"),
        rows("the head instead of the embedding", head_for_table, "llama", "head"),
        rows("the rows are scaled", table(lambda rows: rows + 0x80), says="scale|factor|time|2"),
    ]


def layers() -> list[Fault]:
    def one(name: str, base: str, plant: Plant, says: str = "", stage: str = "layers", alone: bool = True) -> Fault:
        return Fault(name, base, stage, "{layer}", plant, part="layer 1|model.layers.1", says=says, alone=alone)

    def shifted(axis: int) -> Callable[[Values], Values]:
        return lambda scales: np.roll(scales, 1, axis)

    return [
        one("the weights of two layers are swapped", "s8", exchange_layers, "layer 2|swapped|exchanged"),
        one("a layer has the weights of the previous one", "fp32", repeat_a_layer, "layer 0|another|other"),
        one("o_proj is transposed", "fp32", in_layer(values(O, lambda matrix: matrix.T)), "transpos"),
        one("q_proj is transposed", "s8", in_layer(values(Q, lambda matrix: matrix.T)), "transpos|q_proj"),
        one("q and k are permuted as in GGUF", "llama", in_layer(permute_as_gguf), "permut|GGUF|interleav|q_proj"),
        one("gate and up are swapped", "s8", in_layer(exchange(GATE, UP)), "gate"),
        one("k and v are swapped", "s8", in_layer(exchange(K, V)), "k_proj|v_proj|K and V"),
        one("query heads use the wrong K/V heads", "llama", in_layer(tile_heads), "head|q_proj"),
        one("a bias is zero", "s8", in_layer(values("q_proj.bias", np.zeros_like)), "bias"),
        one("a V bias is zero", "s8", in_layer(values("v_proj.bias", np.zeros_like)), "bias"),
        one("a norm weight has 1 added", "s8", in_layer(values(NORM, lambda weights: weights + 1)), "norm"),
        one("the two norms are swapped", "s8", in_layer(exchange(NORM, SECOND_NORM)), "norm"),
        one("a row of down is scaled by 1.5", "s8", in_layer(scale_row(DOWN, 77, 1.5)), "row|down", alone=False),
        one("a row of up is scaled by 1.5", "s8", in_layer(scale_row(UP, 200, 1.5)), "scale|row", alone=False),
        one("a row of q has a flipped sign", "s8", in_layer(scale_row(Q, 40, -1)), "scale|row|q_proj", alone=False),
        one("scales are shifted by a row", "s8", in_layer(values(DOWN + "_scale", shifted(0))), "scale|row"),
        one("scales are shifted by a block", "s4", in_layer(values(DOWN + "_scale", shifted(1))), "scale|block"),
        one("scales are per column", "s8", in_layer(column_scales), "axis|column|scale|graph|Dequantize", EARLY),
        one("nibbles are swapped", "s4", in_layer(values(GATE, lambda v: v << 4 | v >> 4)), "nibble|4|gate"),
        one("a row of up is rounded to zero", "s8", in_layer(to_nothing(UP, 200)), "row 200.*zero|few levels"),
        one("s4: a row of up is rounded to zero", "s4", in_layer(to_nothing(UP, 200)), "row 200.*zero|few levels"),
        one("a scale is infinite", "s8", in_layer(to_nothing(UP, 200, np.inf)), "scale.*not finite"),
        one("a row is zero", "s8", in_layer(zero_row(DOWN, 17)), "zero|row|down"),
        one("a row of o_proj is zero", "fp32", in_layer(zero_row(O, 90)), "zero|row|o_proj"),
        one("fp16 overflows", "fp16", in_layer(overflow), "overflow|finite|65504|gate|up_proj"),
    ]  # fmt: skip


def column_scales(model: onnx.ModelProto) -> None:
    """o_proj is square, so its scales fit its columns too."""
    made = next(entry for entry in model.graph.node if any(name.endswith(O) for name in entry.input))
    made.attribute[0].i = 1


def tenth_more(weights: Values) -> Values:
    return weights * np.float32(1.1)


def shift_head(model: onnx.ModelProto) -> None:
    for name in ("model.embed_tokens.weight", "model.embed_tokens.weight_scale"):
        put(model, name, np.roll(get(model, name), 1, axis=0))


def head() -> list[Fault]:
    def one(name: str, base: str, plant: Plant, says: str = "", alone: bool = True) -> Fault:
        return Fault(name, base, "post", "{post}", plant, says=says, alone=alone)

    table = "model.embed_tokens.weight"
    norm = "model.norm.weight"
    return [
        one("the embedding instead of the head", "llama", tied_head, "tied|embedding"),
        one("the rows of the head are shifted", "s8", in_post(shift_head), "shift|row"),
        one("the final norm's weights are one", "s8", in_post(values(norm, np.ones_like)), "norm"),
        one("a row of the head is zero", "s8", in_post(zero_row(table, 411)), "411|zero|row"),
        one("a row of the head is rounded to zero", "s8", in_post(to_nothing(table, 411)), "411"),
        one("a row of the head is scaled by 1.5", "s8", in_post(scale_row(table, 411, 1.5)), "411|scale|row"),
        one("the logits are scaled", "s8", in_post(values(norm, tenth_more)), "scale|norm|factor"),
        one("a float row of the head has a flipped sign", "llama", in_post(values(HEAD, flip_row)), "411|sign|row"),
    ]  # fmt: skip


def flip_row(rows: Values) -> Values:
    rows[411] *= -1
    return rows

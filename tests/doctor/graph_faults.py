"""Faults that a buggy compiler could make in graphs and tables; the manifest matches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
from onnx import TensorProto, helper

from tests.doctor.axmodels import attribute, edit, get, manifest, metadata, node, put
from tests.doctor.fault import Fault
from tests.doctor.weight_faults import Plant, in_layer, in_post


def angles(theta: float, positions: Any, dim: int) -> Any:
    return np.asarray(positions, np.float64)[:, None] * theta ** (-np.arange(0, dim, 2) / dim)


def rotary(theta: float, dim: int = 32) -> Callable[[onnx.ModelProto], None]:
    """Tables of plain rotary frequencies."""

    def change(model: onnx.ModelProto) -> None:
        low = int(get(model, "rotary.low.rows"))
        for part, step in (("high", low), ("low", 1)):
            for name, function in (("cos", np.cos), ("sin", np.sin)):
                rows = step * np.arange(len(get(model, f"rotary.{part}.{name}")))
                put(model, f"rotary.{part}.{name}", function(angles(theta, rows, dim)).astype(np.float32))

    return change


def every_layer(change: Callable[[onnx.ModelProto], object]) -> Plant:
    def plant(bundle: Path, checkpoint: Path) -> None:
        for path in sorted(bundle.glob("*_l*.axmodel")):
            edit(bundle, path.name, lambda model: (change(model), None)[1])

    return plant


def zero_rotary(model: onnx.ModelProto) -> None:
    """Zeros from position 128 on."""
    for name in ("rotary.high.cos", "rotary.high.sin"):
        values = get(model, name)
        values[128 // int(get(model, "rotary.low.rows")) :] = 0
        put(model, name, values)


def zero_the_last_position(model: onnx.ModelProto) -> None:
    """Also zeroes the other positions in the same row of the high table."""
    values = get(model, "rotary.high.cos")
    values[-1] = 0
    put(model, "rotary.high.cos", values)


def exchange_tables(model: onnx.ModelProto) -> None:
    """Swaps the tables of cos and sin in the sums."""
    for turned in (entry for entry in model.graph.node if entry.op_type == "RotaryEmbedding"):
        turned.input[1], turned.input[2] = turned.input[2], turned.input[1]


def interleave(model: onnx.ModelProto) -> None:
    for index in (0, 1):
        attribute(node(model, "RotaryEmbedding", index), "interleaved", 1)


def epsilon(value: float, *norms: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        for index in norms:
            attribute(node(model, "RMSNormalization", index), "epsilon", value)

    return change


def attention(**attributes: float) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        for name, value in attributes.items():
            attribute(node(model, "Attention"), name, value)

    return change


def no_mask(model: onnx.ModelProto) -> None:
    """Attention without a mask; the input stays declared."""
    del node(model, "Attention").input[3:]


def new_rows_first(model: onnx.ModelProto) -> None:
    """New rows before the cached ones."""
    for index in (0, 1):
        concat = node(model, "Concat", index)
        concat.input[:] = reversed(concat.input)


def unrotated_keys(model: onnx.ModelProto) -> None:
    """Attention reads the right keys, but the cache gets them before rotary embedding."""
    written = next(entry for entry in model.graph.node if "K_cache_out" in entry.output)
    before = next(entry for entry in model.graph.node if written.input[0] in entry.output)
    right = helper.make_node("Cast", [written.input[0]], ["right"], to=TensorProto.FLOAT)
    narrow = helper.make_node("Cast", ["right"], ["right keys"], to=written.attribute[0].i)
    written.input[0] = before.input[0]
    concat = node(model, "Concat", 0)
    concat.input[1] = "right keys"
    at = list(model.graph.node).index(written)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:at], right, narrow, *nodes[at:]])


def keys_for_values(model: onnx.ModelProto) -> None:
    """K_cache_out and V_cache_out are swapped; attention itself is right."""
    keys, values = (next(e for e in model.graph.node if name in e.output) for name in ("K_cache_out", "V_cache_out"))
    keys.output[0], values.output[0] = values.output[0], keys.output[0]
    for index, name in enumerate(("V_cache_out", "K_cache_out")):
        node(model, "Concat", index).input[1] = name


def other_activation(model: onnx.ModelProto) -> None:
    """Sigmoid instead of SiLU."""
    sigmoid = node(model, "Sigmoid")
    silu = next(entry for entry in model.graph.node if sigmoid.output[0] in entry.input)
    for entry in model.graph.node:
        entry.input[:] = [sigmoid.output[0] if name == silu.output[0] else name for name in entry.input]
    model.graph.node.remove(silu)


def residual_of_the_norm(model: onnx.ModelProto) -> None:
    """The output of attention is added to the normalised input."""
    normed = node(model, "RMSNormalization", 0)
    add = next(entry for entry in model.graph.node if entry.op_type == "Add" and normed.input[0] in entry.input)
    add.input[list(add.input).index(normed.input[0])] = normed.output[0]


def no_second_norm(model: onnx.ModelProto) -> None:
    """The MLP reads the residual stream without its norm."""
    norm = node(model, "RMSNormalization", 1)
    for entry in model.graph.node:
        entry.input[:] = [norm.input[0] if name == norm.output[0] else name for name in entry.input]
    model.graph.node.remove(norm)


def no_final_norm(model: onnx.ModelProto) -> None:
    norm = node(model, "RMSNormalization", 0)
    for entry in model.graph.node:
        entry.input[:] = [norm.input[0] if name == norm.output[0] else name for name in entry.input]
    model.graph.node.remove(norm)


def rotated_otherwise(which: int, theta: float) -> Callable[[onnx.ModelProto], None]:
    """Other rotary tables for queries (0) or keys (1)."""

    def change(model: onnx.ModelProto) -> None:
        turned = node(model, "RotaryEmbedding", which)
        half = get(model, "rotary.low.cos").shape[1]
        for at, function in ((1, np.cos), (2, np.sin)):
            values = function(angles(theta, np.arange(1024), 2 * half)).astype(np.float32)
            own = onnx.numpy_helper.from_array(values, f"own.{at}")
            model.graph.initializer.append(own)
            turned.input[at] = own.name
        turned.input.append(next(entry.output[0] for entry in model.graph.node if "indices" in entry.input))

    return change


def exchange_branches(model: onnx.ModelProto) -> None:
    """The activation is applied to up instead of gate."""
    sigmoid = node(model, "Sigmoid")
    inner = next(entry for entry in model.graph.node if entry.op_type == "Mul" and sigmoid.output[0] in entry.input)
    products = [inner, next(entry for entry in model.graph.node if inner.output[0] in entry.input)]
    gate = sigmoid.input[0]
    up = next(name for name in products[1].input if name != products[0].output[0])
    for entry in (sigmoid, *products):
        entry.input[:] = [{gate: up, up: gate}.get(name, name) for name in entry.input]


def by_another_compiler(plant: Plant) -> Plant:
    """Sets another digest in the manifest, for which other graphs are allowed."""

    def both(bundle: Path, checkpoint: Path) -> None:
        plant(bundle, checkpoint)
        manifest(bundle, lambda values: values["tools"].update(digest="0" * 16))

    return both


def layers() -> list[Fault]:
    def one(name: str, base: str, change: Any, says: str, stage: str = "layers", part: str = "layer 1") -> Fault:
        return Fault(name, base, stage, "{layer}", in_layer(change), part=part, says=says)

    def every(name: str, base: str, plant: Plant, says: str) -> Fault:
        return Fault(name, base, "layers", "{layer0}", plant, part="layer 0", says=says)

    rope, kept = "[Rr]o(pe|tary)", "layers|cache"
    return [
        Fault(
            "s4: another compiler's bundle lacks a norm",
            "s4",
            "layers",
            "{layer}",
            by_another_compiler(in_layer(no_second_norm)),
            says="post_attention_layernorm",
        ),
        every("the rope base is wrong", "s8", every_layer(rotary(1e6)), f"{rope}.*(base|theta)"),
        every("the rope base is wrong by a fifth", "fp32", every_layer(rotary(12000.0)), f"{rope}.*(base|theta)"),
        every("the rope scaling is missing", "llama", every_layer(rotary(500000.0)), f"{rope}.*scal"),
        one("one layer has another rope base", "s8", rotary(5e5), rope),
        one("rotary is interleaved", "s8", interleave, "interleav|neighbour"),
        one("cos and sin are swapped", "s8", exchange_tables, f"{rope}|cos"),
        every("rotary is zero from 128 on", "s8", every_layer(zero_rotary), f"{rope}|position"),
        one("rotary is zero at the last position", "s8", zero_the_last_position, f"{rope}|position"),
        one("eps is 1e-2", "s8", epsilon(1e-2, 0, 1), "eps"),
        one("eps is 1e-4", "fp32", epsilon(1e-4, 0, 1), "eps"),
        one("eps of the second norm is 1e-5", "fp32", epsilon(1e-5, 1), "eps"),
        one("attention is scaled by head_dim", "s8", attention(scale=1 / 32), "scale"),
        one("attention is not scaled", "fp32", attention(scale=1.0), "scale"),
        one("attention is capped", "fp32", attention(softcap=5.0), "softcap|cap|attention"),
        one("the mask is not read", "s8", no_mask, "mask|Attention has 3 inputs"),
        one("new rows before cached rows", "s8", new_rows_first, "order|cached|history|K/V", kept),
        one("the cache gets keys before rotary embedding", "s8", unrotated_keys, f"{rope}|K_cache_out|K ", kept),
        one("K and V are swapped in the cache", "s8", keys_for_values, "K_cache_out|K and V|K/V|values|swapped", kept),
        one("sigmoid instead of SiLU", "s8", other_activation, "activation|SiLU|sigmoid|graph|operator|mlp|MLP"),
        one("the residual is of the normed input", "s8", residual_of_the_norm, "residual|norm|Norm|graph|operator"),
        one("the second norm is missing", "s8", no_second_norm, "norm"),
        one("s4: the second norm is missing", "s4", no_second_norm, "RMSNormalization", "layers"),
        one("s4: K and V are swapped in the cache", "s4", keys_for_values, "K_cache_out.*V_cache_out", "layers"),
        one("s4: sigmoid instead of SiLU", "s4", other_activation, "Mul|Sigmoid", "layers"),
        one("s4: keys have another rope base", "s4", rotated_otherwise(1, 10100.0), rope, "layers"),
        one("the activation is applied to up", "s4", exchange_branches, "Sigmoid.*gate_proj", "layers"),
        one("a layer has window metadata", "s8", lambda model: metadata(model, window="16"), "window", "layers"),
        one("queries have another rope base", "s8", rotated_otherwise(0, 10100.0), rope, "layers"),
        one("s4: the attention scale is 3 % larger", "s4", attention(scale=1.03 / 32**0.5), "scale", "layers"),
    ]  # fmt: skip


def head() -> list[Fault]:
    return [
        Fault("the final norm is missing", "s8", "post", "{post}", in_post(no_final_norm), says="norm"),
        Fault("s4: the final norm is missing", "s4", "post", "{post}", in_post(no_final_norm), says="norm|RMSNorm"),
        Fault("eps of the final norm is 1e-2", "s8", "post", "{post}", in_post(epsilon(1e-2, 0)), says="eps"),
        Fault("eps of the final norm is 1e-4", "fp32", "post", "{post}", in_post(epsilon(1e-4, 0)), says="eps"),
    ]

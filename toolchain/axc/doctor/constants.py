"""Compares the constants of a graph (norm epsilon, rotary tables, head counts, attention scale) with the reference.

The expected values come from the modules of transformers' model, made from the checkpoint's config.json.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from axc.doctor import rotary_tables
from axc.doctor.stored import Floats, Stored
from axrun.format.axmodel import Axmodel, Node

if TYPE_CHECKING:
    from axc.reference import Reference

EPSILONS = ("variance_epsilon", "eps", "epsilon")  # attribute names in transformers' norms
TURN = 2.0**-21  # relative error of an angle: of a frequency and of its product with a position
VALUE = 2e-6


@dataclass(frozen=True)
class Constant:
    """A constant that differs from the checkpoint's."""

    what: str
    expected: str
    seen: str
    cause: str


def differences(
    model: Axmodel, stored: Mapping[str, Stored], reference: Reference, layer: int | None
) -> Iterator[Constant]:
    """The wrong constants of a layer's axmodel, or of the post model (`layer` None)."""
    yield from _norms(model, reference)
    if layer is not None:
        yield from _heads(model, reference)
        yield from _tables(model, stored, reference)


def _norms(model: Axmodel, reference: Reference) -> Iterator[Constant]:
    for node in model.nodes:
        if node.op_type not in ("RMSNormalization", "LayerNormalization") or len(node.inputs) < 2:
            continue
        wanted = _epsilon(reference, node.inputs[1])
        seen = _number(node, "epsilon", 1e-5)
        if wanted is not None and np.float32(seen) != np.float32(wanted):
            yield Constant(
                f"epsilon of {node.inputs[1]}",
                f"rms_norm_eps {wanted:g}",
                f"{seen:g}",
                f"the norm's epsilon is {seen:g}, but {wanted:g} in config.json of the checkpoint",
            )
        if node.attributes.get("axis", -1) != -1:
            axis = node.attributes["axis"]
            yield Constant(
                f"axis of {node.inputs[1]}", "axis -1", f"axis {axis}", "the norm is computed along another axis"
            )


def _epsilon(reference: Reference, weight: str) -> float | None:
    try:
        module = reference.model.get_submodule(weight.rpartition(".")[0])
    except AttributeError:
        return None
    return next((float(getattr(module, name)) for name in EPSILONS if hasattr(module, name)), None)


def _heads(model: Axmodel, reference: Reference) -> Iterator[Constant]:
    config = reference.config.get_text_config()
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    for node in model.nodes:
        if node.op_type != "Attention":
            continue
        for key, wanted, name in (
            ("q_num_heads", heads, "num_attention_heads"),
            ("kv_num_heads", kv_heads, "num_key_value_heads"),
        ):
            seen = node.attributes.get(key)
            if seen != wanted:
                yield Constant(
                    f"{key} of Attention",
                    f"{name} {wanted}",
                    f"{seen}",
                    f"Attention has {key} {seen}, but config.json has {name} {wanted}",
                )
        usual = 1 / math.sqrt(head_dim)
        scale = _number(node, "scale", usual)
        if not math.isclose(scale, _scaling(reference, usual), rel_tol=1e-5):
            wanted_scale = _scaling(reference, usual)
            yield Constant(
                "scale of Attention",
                f"{wanted_scale:g}",
                f"{scale:g}",
                f"attention scores are scaled by {scale:g} instead of {wanted_scale:g}"
                + (", which is 1 / sqrt(head_dim)" if math.isclose(wanted_scale, usual) else ""),
            )
        for extra, right in (("is_causal", 0.0), ("softcap", _softcap(reference))):
            value = _number(node, extra, 0.0)
            if not math.isclose(value, right, rel_tol=1e-5):
                asked, found = (f"{number:g}" if number else "none" for number in (right, value))
                yield Constant(
                    f"{extra} of Attention", asked, found, f"Attention has {extra} {found}, the checkpoint {asked}"
                )


def _scaling(reference: Reference, usual: float) -> float:
    """The reference's scale of attention scores."""
    for module in reference.model.modules():
        if hasattr(module, "scaling") and (hasattr(module, "q_proj") or hasattr(module, "qkv_proj")):
            return float(module.scaling)
    return usual


def _softcap(reference: Reference) -> float:
    """The reference's soft cap of attention scores; 0 for none."""
    found = (getattr(module, "attn_logit_softcapping", None) for module in reference.model.modules())
    return float(next((value for value in found if value), 0.0))


def _interleaved(reference: Reference) -> bool:
    """Whether the reference rotates adjacent elements; determined by calling its `rotate_half`."""
    import torch

    rotate = getattr(sys.modules[type(reference.model).__module__], "rotate_half", None)
    return rotate is not None and bool(torch.equal(rotate(torch.arange(4.0)), torch.tensor([-1.0, 0.0, -3.0, 2.0])))


def _tables(model: Axmodel, stored: Mapping[str, Stored], reference: Reference) -> Iterator[Constant]:
    """Rotary tables of cos and sin [positions, head_dim / 2]."""
    nodes = [node for node in model.nodes if node.op_type == "RotaryEmbedding"]
    interleaved = _interleaved(reference) if nodes else False
    texts = ("0: pairs half a head apart", "1: adjacent pairs")
    pairs = ("elements half a head apart", "adjacent elements (interleaved)")
    for node in nodes:
        seen = bool(node.attributes.get("interleaved", 0))
        if seen != interleaved:
            yield Constant(
                "interleaved of RotaryEmbedding",
                texts[interleaved],
                texts[seen],
                f"the rotary embedding rotates {pairs[seen]}, the checkpoint {pairs[interleaved]}",
            )
    known = set[tuple[str, ...]]()
    for node in nodes:
        if node.inputs[1:3] in known:
            continue
        known.add(node.inputs[1:3])
        try:
            names, cos, sin = rotary_tables.tables(model, stored, node)
        except rotary_tables.Unknown as error:
            expected, cause = "constant tables of cos and sin", "a rotary table is not a constant of the file"
            yield Constant("rotary tables", expected, str(error), cause)
            continue
        wanted = rotary(reference, len(cos))
        if wanted is not None:
            yield from angles(names, cos, sin, *wanted)


def rotary(reference: Reference, positions: int) -> tuple[Floats, Floats] | None:
    """cos and sin [positions, head_dim / 2] of the reference's rotary module; None without a compatible one."""
    import torch

    for name, module in reference.model.named_modules():
        if name.rpartition(".")[2] != "rotary_emb":
            continue
        ids = torch.arange(positions)[None]
        try:
            with torch.no_grad():
                cos, sin = module(torch.zeros(1, 1, 1), ids)
        except (TypeError, ValueError, RuntimeError):
            return None
        half = cos.shape[-1] // 2
        return cos[0, :, :half].float().numpy(), sin[0, :, :half].float().numpy()
    return None


def angles(
    names: tuple[str, ...], cos: Floats, sin: Floats, right_cos: Floats, right_sin: Floats
) -> Iterator[Constant]:
    """Compares tables [positions, head_dim / 2] with the right ones; at most one constant."""
    if cos.shape != right_cos.shape:
        yield Constant(
            names[0],
            f"{list(right_cos.shape)}",
            f"{list(cos.shape)}",
            "the width of the rotary table is not half the head size",
        )
        return
    frequency = np.arctan2(right_sin[1], right_cos[1]) if len(cos) > 1 else np.zeros(cos.shape[1])
    turn = np.arange(len(cos))[:, None] * np.abs(frequency)[None, :] * TURN
    reach = np.abs(right_cos).max()
    wrong = ~(np.abs(cos - right_cos) <= (VALUE + turn) * max(reach, 1))
    wrong_sin = ~(np.abs(sin - right_sin) <= (VALUE + turn) * max(reach, 1))
    if not (wrong | wrong_sin).any():
        return
    name = names[0] if wrong.any() else names[1]
    bad = wrong if wrong.any() else wrong_sin
    row, column = (int(x) for x in np.argwhere(bad)[0])
    table, right = (cos, right_cos) if wrong.any() else (sin, right_sin)
    yield Constant(
        name,
        f"{right[row, column]:.6g} at position {row}, frequency {column}",
        f"{table[row, column]:.6g}",
        _why(cos, sin, right_cos, right_sin, (wrong | wrong_sin).any(axis=1)),
    )


def _why(cos: Floats, sin: Floats, right_cos: Floats, right_sin: Floats, bad: NDArray[np.bool_]) -> str:
    """The cause of a wrong rotary table."""
    rows = np.flatnonzero(bad)
    with np.errstate(all="ignore"):
        if not (np.isfinite(cos).all() and np.isfinite(sin).all()):
            return "the rotary table is not finite"
        for table, called in ((cos, "cos"), (sin, "sin")):
            if not table[rows].any():
                return f"the rotary {called} table is zero from position {rows[0]} on"
        if np.allclose(cos, right_sin, atol=1e-4) and np.allclose(sin, right_cos, atol=1e-4):
            return "the rotary tables of cos and sin are swapped"
        if np.allclose(sin, -right_sin, atol=1e-4) and np.allclose(cos, right_cos, atol=1e-4):
            return "the rotary embedding rotates in the opposite direction"
        radius, right_radius = np.hypot(cos, sin), np.hypot(right_cos, right_sin)
        factor = float(np.median(radius / right_radius))
        if abs(factor - 1) > 1e-4 and np.ptp(radius) < 1e-3 * abs(factor):
            return f"the rotary table is scaled by {factor:.4g}: another attention_factor in rope_scaling"
        for shift in (1, -1, 2, -2):
            one, other = (
                (slice(shift, None), slice(None, -shift)) if shift > 0 else (slice(None, shift), slice(-shift, None))
            )
            if np.allclose(cos[other], right_cos[one], atol=1e-4) and np.allclose(
                sin[other], right_sin[one], atol=1e-4
            ):
                return f"the rotary table is shifted by {abs(shift)}: position 0 has the angles of position {shift}"
        if len(rows) < 0.9 * len(cos) - 1:
            last = "on" if rows[-1] == len(cos) - 1 else f"to {rows[-1]}"
            return f"the rotary table is wrong from position {rows[0]} {last}, right at {len(cos) - len(rows)} others"
        return _base(cos, sin, right_cos, right_sin)


def _base(cos: Floats, sin: Floats, right_cos: Floats, right_sin: Floats) -> str:
    """Infers rope_theta or a scaling from the angles at position 1."""
    seen = np.arctan2(sin[1].astype(np.float64), cos[1].astype(np.float64))
    right = np.arctan2(right_sin[1].astype(np.float64), right_cos[1].astype(np.float64))
    half = len(seen)
    ratio = seen / right
    if np.ptp(ratio) < 1e-3 * abs(float(np.median(ratio))):
        return f"all rotary frequencies are divided by {1 / float(np.median(ratio)):.4g}: the factor in rope_scaling"
    exponent = np.arange(half) / half
    bases = [_theta(angles, exponent) for angles in (seen, right)]
    if bases[0] is not None and bases[1] is not None:
        return f"the base of the rotary embedding is {bases[0]:.6g}, rope_theta of the checkpoint is {bases[1]:.6g}"
    if bases[0] is not None:
        return f"the rotary embedding has base {bases[0]:.6g} but lacks the rope_scaling of the checkpoint"
    return "the rotary frequencies differ: rope_theta or rope_scaling of another config.json"


def _theta(angles: NDArray[np.float64], exponent: NDArray[np.float64]) -> float | None:
    """The base b if the angles are b ** -exponent, else None."""
    if len(angles) < 3 or not (angles > 0).all() or abs(angles[0] - 1) > 1e-4:
        return None
    logarithms = -np.log(angles[1:]) / exponent[1:]
    if np.ptp(logarithms) > 2e-3 * max(abs(float(np.median(logarithms))), 1e-6):
        return None
    return float(np.exp(np.median(logarithms)))


def _number(node: Node, key: str, default: float) -> float:
    value: Any = node.attributes.get(key, default)
    return float(value) if isinstance(value, (int, float)) else default

"""Figures: reference data of the checkpoint, stored in a bundle by `axc reference`, to check the bundle on a board.

The inputs of a layer (hidden states and K/V rows) are drawn from a few real rows of it, so that the inputs for a full
prefill and the whole context need only the indices. Outputs are stored for a few tokens only.
Size of the file: about 4 MB for Qwen2-0.5B (24 layers of 896, six groups), growing with layers x hidden size.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from axrun.errors import BadInput
from axrun.format import npz
from axrun.format.bundle import Bundle
from axrun.format.dtypes import FLOATS, bf16_to_f32, from_float32, to_float32

NAME = "figures.npz"  # in a bundle
SCHEMA = 1
MOST_BYTES = 256 << 20
TABLE_ROWS = 64  # rows of the embedding table per checksum
MOST_VISITS = 16  # per layer, plus 4 for each shape group
MOST_PROBES = 64  # average per visit
WALK = -1  # value of `group` for a visit with the runner's own chunks and cache

# array: (kinds of dtype, number of dimensions); L layers, B base rows, N positions, V visits, P probes
ARRAYS = {
    "hidden": ("uf", 3),
    "keys": ("uf", 3),
    "values": ("uf", 3),
    "given": ("u", 1),
    "kept": ("u", 1),
    "visits": ("i", 2),
    "probes": ("u", 2),
    "updates": ("if", 3),
    "updates_scale": ("f", 2),
    "new_keys": ("if", 3),
    "new_keys_scale": ("f", 2),
    "new_values": ("if", 3),
    "new_values_scale": ("f", 2),
    "table_ids": ("u", 1),
    "table_rows": ("u", 2),
    "table_sums": ("u", 1),
    "post_hidden": ("uf", 2),
    "post_logits": ("if", 2),
    "post_logits_scale": ("f", 1),
    "asked": ("u", 1),
    "answer": ("u", 1),
    "answer_ids": ("u", 1),
    "answer_logits": ("f", 2),
}

CARRIED = ("hidden", "keys", "values", "post_hidden", "table_rows")  # unsigned if bfloat16

Array = NDArray[Any]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Figures:
    """Inputs and outputs of the layers, the post model and the embedding, computed from the float32 checkpoint.

    `hidden` [L, B, H], `keys` and `values` [L, B, D] are the base rows, in the hidden state type; `given` and `kept`
    [N] are the indices of the base rows at each position. `visits` [V, 3]: group (WALK: the runner's chunks), start,
    count. `probes` [P, 2]: visit, position in the context. `updates` [L, P, H], what each layer adds to its input, and
    `new_keys`, `new_values` [L, P, D], its K/V rows: integers times a scale per row, or floats with scales of 1.
    `table_ids`, `table_rows` [n, H]: rows of the embedding table in bfloat16, `table_sums` CRC-32 of each TABLE_ROWS
    rows. `post_hidden` [r, H] and `post_logits` [r, vocab]. `asked`, `answer`: a prompt and its greedy answer,
    `answer_logits` [tokens, n] the logits of each of its tokens for `answer_ids`. `about`: vocab_size, exact (weight
    types that represent the checkpoint's values exactly), text (ids by the checkpoint's tokenizer), provenance.
    """

    hidden: Array
    keys: Array
    values: Array
    given: Array
    kept: Array
    visits: Array
    probes: Array
    updates: Array
    updates_scale: Floats
    new_keys: Array
    new_keys_scale: Floats
    new_values: Array
    new_values_scale: Floats
    table_ids: Array
    table_rows: Array
    table_sums: Array
    post_hidden: Array
    post_logits: Array
    post_logits_scale: Floats
    asked: Array
    answer: Array
    answer_ids: Array
    answer_logits: Floats
    about: Mapping[str, Any]

    @property
    def hidden_type(self) -> str:
        return str(self.about["hidden_state_type"])

    def encode(self) -> bytes:
        """The bytes of the file; the same values give the same bytes."""
        sums = {name: _sum(getattr(self, name)) for name in ARRAYS}
        return npz.encode(
            {name: getattr(self, name) for name in ARRAYS}, {**self.about, "schema": SCHEMA, "sums": sums}
        )

    def inputs(self, layer: int, start: int, stop: int) -> Floats:
        """The input hidden states [stop - start, H] of a layer at these positions."""
        return to_float32(self.hidden[layer][self.given[start:stop]], FLOATS[self.hidden_type])

    def history(self, layer: int, start: int) -> tuple[Floats, Floats]:
        """The K and V rows [start, D] before position `start`."""
        return picked(self.keys[layer], self.values[layer], self.kept[:start], self.hidden_type)

    def of_visit(self, visit: int) -> Array:
        """The indices of the probes of a visit."""
        return np.flatnonzero(self.probes[:, 0] == visit)


def picked(keys: Array, values: Array, picks: Array, hidden_type: str) -> tuple[Floats, Floats]:
    """K and V [n, D] of the base rows with the indices `picks`, as float32 values of the hidden state type.

    V gets a linear trend over the positions, from -1 to 1 times one of its rows, so that the mean of V reveals which
    rows were attended to.
    """
    dtype = FLOATS[hidden_type]
    trend = np.linspace(-1, 1, len(picks), dtype=np.float32)[:, None]
    base = to_float32(values, dtype)
    mixed = base[picks] * np.float32(0.5) + base[len(base) // 2] * trend
    return to_float32(keys, dtype)[picks], to_float32(from_float32(mixed, dtype), dtype)


def packed(rows: Floats, exact: bool) -> tuple[Array, Floats]:
    """Rows [..., n] as int16 with a float32 scale [...] each; `exact`: unchanged, with scales of 1."""
    if exact:
        return rows.astype(np.float32), np.ones(rows.shape[:-1], np.float32)
    scale = np.maximum(np.abs(rows).max(axis=-1, initial=0.0) / 32767, np.float32(1e-30)).astype(np.float32)
    return np.rint(rows / scale[..., None]).clip(-32767, 32767).astype(np.int16), scale


def unpacked(rows: Array, scale: Any) -> Floats:
    """The float32 rows: the inverse of `packed`."""
    return np.asarray(rows.astype(np.float32) * np.asarray(scale, np.float32)[..., None])


def read(path: Path, bundle: Bundle) -> Figures:
    """Reads and validates the figures of a bundle.

    Raises BadInput if the file cannot be read, is damaged, or belongs to another bundle.
    """
    try:
        arrays, about = npz.read(path, ARRAYS, SCHEMA, MOST_BYTES)
    except npz.Damaged as error:
        raise _damaged(path, str(error)) from None
    figures = Figures(**arrays, about=about)
    fault = _about_fault(about, bundle) or _sums_fault(figures, about) or _fault(figures, bundle)
    if fault:
        raise _damaged(path, fault)
    return figures


def _about_fault(about: Mapping[str, Any], bundle: Bundle) -> str:
    if about.get("hidden_state_type") != bundle.hidden_state_type:
        return f"its hidden_state_type is {about.get('hidden_state_type')!r:.40}, not {bundle.hidden_state_type!r}"
    if about.get("vocab_size") != bundle.vocab_size:
        return f"its vocab_size is {about.get('vocab_size')!r:.40}, the bundle's {bundle.vocab_size}"
    exact, text = about.get("exact"), about.get("text")
    if not isinstance(exact, list) or not all(type(name) is str for name in exact):
        return f"its exact types are {exact!r:.60}"
    if not isinstance(text, dict):
        return f"its text is {text!r:.60}"
    return ""


def _sum(array: Array) -> int:
    return zlib.crc32(np.ascontiguousarray(array).tobytes())


def _sums_fault(figures: Figures, about: Mapping[str, Any]) -> str:
    """Describes arrays that do not match their checksums; files without checksums are accepted."""
    sums = about.get("sums")
    if not isinstance(sums, dict):
        return ""
    return next(
        (f"the checksum of {name} is wrong" for name in ARRAYS if sums.get(name) != _sum(getattr(figures, name))), ""
    )


def _fault(figures: Figures, bundle: Bundle) -> str:
    """Describes the first invalid value; empty if all are valid."""
    layers, width, hidden = bundle.layers, bundle.kv_size, bundle.hidden_size
    base, positions = figures.hidden.shape[1], len(figures.given)
    probes, visits, rows = len(figures.probes), len(figures.visits), len(figures.post_hidden)
    carrier = {"fp32": "f4", "fp16": "f2", "bf16": "u2"}[bundle.hidden_state_type]
    if not base or not 0 < positions <= max(bundle.kv_cache_len, 1) or not visits or not probes:
        return f"it has {base} base rows, {positions} positions, {visits} visits and {probes} probes"
    if visits > MOST_VISITS + 4 * len(bundle.groups) or probes > MOST_PROBES * visits:
        return f"it has {visits:,} visits and {probes:,} probes, too many per layer"
    if not rows or not len(figures.table_ids):
        return f"it has {rows} rows of logits and {len(figures.table_ids)} of the embedding table"
    for name, shape in (
        ("hidden", (layers, base, hidden)),
        ("keys", (layers, base, width)),
        ("values", (layers, base, width)),
        ("kept", (positions,)),
        ("visits", (visits, 3)),
        ("probes", (probes, 2)),
        ("updates", (layers, probes, hidden)),
        ("updates_scale", (layers, probes)),
        ("new_keys", (layers, probes, width)),
        ("new_keys_scale", (layers, probes)),
        ("new_values", (layers, probes, width)),
        ("new_values_scale", (layers, probes)),
        ("table_rows", (len(figures.table_ids), hidden)),
        ("table_sums", (-(-bundle.vocab_size // TABLE_ROWS),)),
        ("post_hidden", (rows, hidden)),
        ("post_logits", (rows, bundle.vocab_size)),
        ("post_logits_scale", (rows,)),
        ("answer_logits", (len(figures.answer), len(figures.answer_ids))),
    ):
        if getattr(figures, name).shape != shape:
            return f"its {name} are {list(getattr(figures, name).shape)}, expected {list(shape)}"
    for name in ("hidden", "keys", "values", "post_hidden"):
        if getattr(figures, name).dtype.str[1:] != carrier:
            return f"its {name} are {getattr(figures, name).dtype}, not in the type {bundle.hidden_state_type}"
    if figures.table_rows.dtype.itemsize != 2:
        return f"its table_rows are {figures.table_rows.dtype}"
    for name, most in (("given", base), ("kept", base), ("table_ids", bundle.vocab_size)):
        if int(getattr(figures, name).max(initial=0)) >= most:
            return f"its {name} refer to rows beyond {most}"
    for name in ("asked", "answer", "answer_ids"):
        if int(getattr(figures, name).max(initial=0)) >= bundle.vocab_size:
            return f"its {name} are outside the vocabulary of {bundle.vocab_size}"
    if len(figures.asked) + len(figures.answer) > bundle.kv_cache_len:
        return f"its answer of {len(figures.asked)} + {len(figures.answer)} tokens does not fit the context"
    return _visits_fault(figures, bundle, positions) or _values_fault(figures)


def _visits_fault(figures: Figures, bundle: Bundle, positions: int) -> str:
    for group, start, count in figures.visits.tolist():
        walk = group == WALK and start == 0
        if not walk and not (0 <= group < len(bundle.groups) and 0 <= start <= bundle.groups[group].history):
            return f"it visits group {group} after {start} rows"
        if not 0 < count <= (positions if walk else bundle.groups[group].tokens) or start + count > positions:
            return f"it visits {count} tokens after {start} rows in group {group}"
    for visit, position in figures.probes.tolist():
        if visit >= len(figures.visits):
            return f"it probes visit {visit} of {len(figures.visits)}"
        _, start, count = figures.visits[visit].tolist()
        if not start <= position < start + count:
            return f"it probes position {position} of visit {visit}"
    return ""


def _values_fault(figures: Figures) -> str:
    for name in ARRAYS:
        array = getattr(figures, name)
        if name in CARRIED and array.dtype.kind == "u":
            array = bf16_to_f32(array)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            return f"its {name} are not finite"
        if name.endswith("_scale") and not (array > 0).all():
            return f"its {name} are not above zero"
    return ""


def _damaged(path: Path, what: str) -> BadInput:
    return BadInput(
        f"{path} has no valid figures of this bundle: {what}\nWrite them again with `axc reference --bundle`."
    )

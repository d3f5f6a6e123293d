"""Comparison of a layer's outputs with the figures: errors per row, and the likely cause from their pattern."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from axrun.agreement import NOISE, ROUNDING, Noise, explained, update_errors
from axrun.doctor.direct import Floats, Result
from axrun.doctor.figures import WALK, Array, Figures, unpacked
from axrun.format.bundle import Bundle

# Additional tolerance for the vendor's compiler with the same types. Not measured, since no board was available.
VENDORS = 2.0
MOST_MEDIAN, LEAST_WRONG, FAR = 0.05, 0.7, 8.0  # thresholds of wrong_channels
# maximum ratio of the errors of right to wrong K rows where a rotary table ends; with a wrong base errors grow
# gradually
ABRUPT = 0.02
OUTPUT, KEYS, VALUES = "output", "K row", "V row"


@dataclass(frozen=True)
class RowError:
    """The error of one row; `what` is OUTPUT, KEYS or VALUES."""

    what: str
    stage: str
    group: int
    start: int
    position: int
    cosine: float
    error: float

    @property
    def place(self) -> str:
        if self.stage == "decode":
            return f"decode at position {self.position}"
        behind = f" after {self.start} rows" if self.start else ""
        return f"{self.stage}{behind}, position {self.position}"


@dataclass(frozen=True)
class Expected:
    """Reference rows at the probes of a visit: the update of the layer, and its K and V."""

    updates: Floats
    keys: Floats
    values: Floats


def allowed(bundle: Bundle, figures: Figures) -> Noise:
    """The tolerance for the layers of a bundle."""
    return _noise(bundle, figures, bundle.flag("weight_type"))


def allowed_whole(bundle: Bundle, figures: Figures) -> Noise:
    """The tolerance for the whole model, including the post model and the bfloat16 embedding table."""
    types = {bundle.flag("weight_type"), bundle.flag("post_weight_type")}
    return _noise(bundle, figures, *sorted(types), *(() if "bf16" in figures.about["exact"] else ("bf16",)))


def allowed_post(bundle: Bundle, figures: Figures) -> Noise:
    return _noise(bundle, figures, bundle.flag("post_weight_type"))


def _noise(bundle: Bundle, figures: Figures, *weight_types: str) -> Noise:
    exact = figures.about["exact"]
    types = {bundle.hidden_state_type, *(name if name in NOISE else "s4" for name in weight_types if name not in exact)}
    noise = explained(*sorted(types))
    return noise if bundle.maker == "cpu" else Noise(*(VENDORS * value for value in noise))


def expected(figures: Figures, layer: int, probes: Array) -> Expected:
    """The reference rows of a layer at some probes."""
    return Expected(
        unpacked(figures.updates[layer][probes], figures.updates_scale[layer][probes]),
        unpacked(figures.new_keys[layer][probes], figures.new_keys_scale[layer][probes]),
        unpacked(figures.new_values[layer][probes], figures.new_values_scale[layer][probes]),
    )


def compare(
    figures: Figures, layer: int, visit: int, made: Result, against: int | None = None, kinds: Sequence[str] = ()
) -> list[RowError]:
    """Errors of a layer's outputs against the figures of that or another layer: one entry per row and output.

    `made` has the rows of all tokens of the visit.
    """
    group, start, count = (int(value) for value in figures.visits[visit])
    probes = figures.of_visit(visit)
    positions = figures.probes[probes, 1].astype(int)
    wanted = expected(figures, layer if against is None else against, probes)
    source = layer if against is None else against
    given = figures.inputs(source, start, start + count)[positions - start]
    nothing = np.zeros_like(wanted.keys)
    with np.errstate(all="ignore"):
        pairs = {
            OUTPUT: (made.output, wanted.updates + given, given),
            KEYS: (made.keys, wanted.keys, nothing),
            VALUES: (made.values, wanted.values, nothing),
        }
        found = []
        stage = stage_of(figures, visit)
        for what, (ours, reference, before) in pairs.items():
            if kinds and what not in kinds:
                continue
            rows = update_errors(ours[positions - start], reference, before, figures.hidden_type)
            found += [
                RowError(what, stage, group, start, int(at), float(cosine), float(error))
                for at, cosine, error in zip(positions, *rows)
            ]
    return found


def stage_of(figures: Figures, visit: int) -> str:
    """The stage of a visit: prefill, history (a prefill after cached rows), decode, or walk."""
    group, start, count = (int(value) for value in figures.visits[visit])
    if group == WALK:
        return "walk"
    return "decode" if count == 1 else "history" if start else "prefill"


def wrong(entries: Sequence[RowError], noise: Noise) -> list[RowError]:
    """Entries beyond the tolerance; all entries of a kind if their root mean square exceeds it."""
    found = [entry for entry in entries if not entry.error <= noise.row]
    for what in (OUTPUT, KEYS, VALUES):
        errors = np.array([entry.error for entry in entries if entry.what == what])
        if not found and len(errors) and not np.sqrt((errors**2).mean()) <= noise.rms:
            found = [entry for entry in entries if entry.what == what and not entry.error <= noise.rms]
    return found


def wrong_channels(pairs: Sequence[tuple[Floats, Floats, Floats]], hidden_type: str) -> list[int]:
    """Output channels whose error is much larger than that of the others, and most of the update.

    `pairs`: outputs, expected updates and inputs of a layer, [n, H] each. A single bad matrix row hardly changes the
    error of the whole output row. Measured on tiny-qwen2 in s8: at most 0.04 of the update without a fault, 1.6 for a
    scale with the wrong sign. With 4-bit weights the noise is too high, and no channel is reported.
    """
    ours, updates, given = (np.concatenate(column).astype(np.float64) for column in zip(*pairs))
    error = np.maximum(np.abs(ours - updates - given) - ROUNDING[hidden_type] * np.abs(updates + given), 0)
    errors, moved = (np.sqrt((values**2).mean(axis=0)) for values in (error, updates))
    with np.errstate(all="ignore"):
        relative = np.where(moved > 0, errors / moved, 0)
    if not np.median(relative) < MOST_MEDIAN:
        return []
    far = (relative > LEAST_WRONG) & (errors > FAR * np.median(errors)) & (errors > 1e-4 * moved.max())
    return [int(channel) for channel in np.flatnonzero(far)]


def pattern(bad: Sequence[RowError], entries: Sequence[RowError]) -> str:
    """Describes which rows are wrong, and the usual cause."""
    if not np.isfinite([entry.error for entry in bad]).all():
        return "values are not finite: an overflow, or damaged weights"
    kinds = {entry.what for entry in bad}
    good = [entry for entry in entries if entry not in bad]
    if kinds == {OUTPUT}:
        return _output_pattern(bad, entries)
    if KEYS in kinds and VALUES not in kinds:
        keys = [entry for entry in bad if entry.what == KEYS]
        right = max((entry.error for entry in good if entry.what == KEYS and entry.position), default=np.inf)
        start = _only_from(keys, entries, KEYS)
        if start and right < ABRUPT * min(entry.error for entry in keys):
            return f"K is right before position {start} and wrong from there on: the rotary tables end or change there"
        if start:
            return "K is right at position 0 and wrong after it: probably the rotary tables (base, scaling or order)"
        if not any(entry.what == KEYS for entry in good):
            return "K is wrong everywhere: probably k_proj, its bias, its norm, the head order, or the rotary tables"
        return "K is wrong at some positions: probably the rotary tables"
    if VALUES in kinds and KEYS not in kinds:
        return "V is wrong and K is right: probably v_proj or its bias"
    return "K and V are wrong: weights of another layer or model, or the norm before them (weight, epsilon)"


def _output_pattern(bad: Sequence[RowError], entries: Sequence[RowError]) -> str:
    """Like `pattern`, if K and V are right."""
    right = [entry for entry in entries if entry.what == OUTPUT and entry not in bad]
    if right and {entry.stage for entry in bad} == {"decode"}:
        return "wrong in decode only: the decode group, or the engine's kernels for one token"
    if right and all(entry.start for entry in bad) and any(entry.start == 0 for entry in right):
        return "wrong after cached rows only: the layer reads its cache or its mask wrongly"
    if start := _only_from(bad, entries, OUTPUT):
        return f"right before position {start} and wrong from there on: the rotary tables, or the mask"
    return "K and V are right, the output is wrong: q_proj, o_proj, the MLP, a norm, or the attention scale"


def _only_from(bad: Sequence[RowError], entries: Sequence[RowError], what: str) -> int:
    """The position from which all rows are wrong, with all before it right; 0 if there is none."""
    first = min(entry.position for entry in bad)
    of_kind = [entry for entry in entries if entry.what == what]
    after = all(entry in bad for entry in of_kind if entry.position >= first)
    return first if after and any(entry.position < first for entry in of_kind) else 0

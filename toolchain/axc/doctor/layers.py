"""Stage `layers`: compares each layer's K, V and output, given the reference's hidden states and K/V rows.

A disagreement is explained by trying causes in turn: weights, constants, graph, the other engine, and last the position
in the context where it starts. Weights, constants and graph are also compared if the outputs agree: a fault in one
matrix row, or with four bits in a whole operator, can be smaller than the quantisation error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from axc import expected_graphs
from axc.doctor import constants, positions, stored, weight_faults
from axc.doctor.case import ENGINES, REBUILD, REPORT, Case
from axc.doctor.positions import Marked
from axc.doctor.stored import Floats, Stored
from axc.doctor.visits import Visit, visits
from axc.doctor.weight_faults import Fault
from axc.weights import cross_check
from axrun.agreement import Agreement, Noise, Rows, cosines, rises, update_errors
from axrun.doctor.direct import OUTPUTS, Layer, Result
from axrun.doctor.graphs import unused_tensor
from axrun.doctor.replay import EXPLAINED
from axrun.doctor.report import Finding
from axrun.doctor.stages import NotExamined
from axrun.errors import BadInput
from axrun.format import axmodel
from axrun.format.axmodel import Axmodel

PER_POSITION = 2.0**-22  # relative error of a rotated row: of its angle, for each position
SENSITIVE = 4.0  # factor on the bounds if weights, constants and graph are right; small random models reach 2
FEWEST = 32  # minimum number of rows of a stage to compare its errors with another stage's
APART = 3.0  # wrong rows must exceed the largest error of right ones by this factor
LARGEST_FLOAT16 = 65504.0
NORMS = ("model.norm.", "model.final_layernorm.")  # final norms


class Measured(NamedTuple):
    """Relative errors [count] of the rows of each output of a visit."""

    visit: Visit
    errors: tuple[Rows, Rows, Rows]
    finite: tuple[bool, bool, bool]


class Trouble(NamedTuple):
    """The first disagreement of a layer, and all its measurements."""

    visit: Visit
    output: str
    text: str
    finite: bool
    measured: list[Measured]
    limits: Noise


def examine(case: Case) -> str | Finding:
    """Examines every layer, in order."""
    bundle = case.bundle
    if bundle.maker != "cpu":
        raise NotExamined("needs a board with an NPU: run `axrun doctor` there")
    if case.expected.rows is None:
        raise NotExamined("the reference has no K/V rows to compare with")
    agreements: list[Agreement] = []
    beyond: list[int] = []
    for index in range(bundle.layers):
        case.say(f"  layer {index + 1} of {bundle.layers}")
        finding = _layer(case, index, agreements, beyond)
        if finding is not None:
            return finding
    for rise in rises([entry for entry in agreements if entry.rows >= FEWEST]):
        return Finding(
            "layers",
            "all layers",
            "",
            "errors that do not depend on the position in the context",
            rise,
            "probably a cached row that is not attended to, or drifting rotary positions",
            REPORT,
        )
    worst = max(agreements, key=lambda entry: entry.worst)
    case.examined["layers"] = agreements
    found = f"{bundle.layers} layers over {case.expected.reach}; largest error {worst.worst:.1e} ({worst.part})"
    found += graph_remark(case)
    if beyond:
        found += f"; above the error expected of the types, without a fault, in layers {', '.join(map(str, beyond))}"
    return found


def _layer(case: Case, index: int, agreements: list[Agreement], beyond: list[int]) -> Finding | None:
    """None if it agrees; `beyond` collects layers with errors above the bounds although nothing is wrong."""
    path = case.bundle.layer_path(index)
    try:
        measured = list(measure(case, index, case.engine))
    except BadInput as refused:
        return _unloadable(case, index, refused)
    trouble = find_trouble(case, index, measured)
    model = axmodel.read(path)
    finding = _quiet(case, index, model) if trouble is None else _explained(case, index, model, trouble)
    if finding is None:
        agreements += _agreements(index, measured)
        beyond += [index] if trouble else []
    return finding


def measure(case: Case, index: int, engine: str) -> Iterator[Measured]:
    """Runs all visits of one layer. Raises BadInput if the engine cannot load it."""
    bundle, expected = case.bundle, case.expected
    layer = Layer(bundle.layer_path(index), engine, None, bundle.hidden_state_type)
    for visit in visits(layer.session.groups, bundle.kv_cache_len, len(expected.ids), expected.probes):
        result = run(case, layer, index, visit)
        yield _measured(case, index, visit, result)


def run(case: Case, layer: Layer, index: int, visit: Visit, shift: int = 0) -> Result:
    """Runs one visit with the reference's hidden states and history."""
    given, _, (keys, values) = _reference(case, index, visit)
    return layer.run(visit.group, visit.start, given, keys[: visit.start], values[: visit.start], shift)


def _reference(case: Case, index: int, visit: Visit) -> tuple[Floats, Floats, tuple[Floats, Floats]]:
    """Input and output hidden states [count, H], and K and V from position 0 on, in the walk including the new rows."""
    expected, part = case.expected, slice(visit.start, visit.start + visit.tokens)
    assert expected.rows is not None
    if visit.probe < 0:
        return expected.trace.inputs[index][part], expected.trace.outputs[index][part], expected.rows[index]
    probe = expected.probes[visit.probe]
    rows = slice(0, visit.tokens)
    return probe.trace.inputs[index][rows], probe.trace.outputs[index][rows], probe.history[index]


def _measured(case: Case, index: int, visit: Visit, result: Result) -> Measured:
    given, wanted, kept = _reference(case, index, visit)
    part = slice(visit.start, visit.start + visit.tokens)
    errors = [
        relative(rows, known[part]) if visit.probe < 0 else Rows(np.ones(visit.tokens), np.zeros(visit.tokens))
        for rows, known in zip(result[:2], kept, strict=True)
    ]
    output = update_errors(result.output, wanted, given, case.bundle.hidden_state_type)
    return Measured(visit, (errors[0], errors[1], output), _finite(result))


def _finite(result: Result) -> tuple[bool, bool, bool]:
    keys, values, output = (bool(np.isfinite(rows).all()) for rows in result)
    return keys, values, output


@np.errstate(all="ignore")
def relative(seen: Floats, wanted: Floats) -> Rows:
    norm = np.linalg.norm(wanted.astype(np.float64), axis=1)
    error = np.linalg.norm(seen.astype(np.float64) - wanted, axis=1) / np.maximum(norm, 1e-30)
    return Rows(cosines(seen, wanted), np.where(np.isfinite(error), error, np.inf))


def find_trouble(case: Case, index: int, measured: list[Measured]) -> Trouble | None:
    """The first visit with errors beyond rounding; K is checked before V before the output."""
    noise = case.noise(case.bundle.flag("weight_type") or "s4")
    for entry in measured:
        for name, rows, finite in zip(OUTPUTS, entry.errors, entry.finite, strict=True):
            last = entry.visit.start + entry.visit.tokens
            limits = noise._replace(
                rms=noise.rms + (PER_POSITION * last if name == "K_cache_out" else 0),
                row=noise.row + (PER_POSITION * last if name == "K_cache_out" else 0),
            )
            fault = Agreement.of(f"layer {index}", entry.visit.text, rows).fault(limits)
            if fault or not finite:
                return Trouble(entry.visit, name, fault if finite else "", finite, measured, limits)
    return None


def _agreements(index: int, measured: list[Measured]) -> Iterator[Agreement]:
    stages: dict[str, list[Rows]] = {}
    for entry in measured:
        stages.setdefault(entry.visit.stage, []).append(entry.errors[2])
    for stage, rows in stages.items():
        yield Agreement.of(f"layer {index}", stage, Rows(*map(np.concatenate, zip(*rows, strict=True))))


def _unloadable(case: Case, index: int, refused: BadInput) -> Finding:
    """The finding for a file that the engine cannot load; the engine is at fault if the other one can."""
    path = case.bundle.layer_path(index)
    seen = str(refused).partition("\n")[0].replace(f"{path} ", "")
    model = axmodel.read(path)
    found = _quiet(case, index, model)
    if found is not None:
        return dataclasses.replace(found, part=f"layer {index}", seen=f"{seen}; {found.seen}")
    try:
        Layer(path, case.other_engine, None, case.bundle.hidden_state_type)
    except BadInput:
        return Finding(
            "layers", f"layer {index}", path.name, "an axmodel that loads", seen, "the file is broken", REBUILD
        )
    return Finding(
        "layers",
        f"layer {index}, engine {case.engine}",
        path.name,
        f"engine {case.engine} loads what {case.other_engine} loads",
        seen,
        f"engine {case.engine} is broken or too old",
        "Install the engine again.",
    )


def _quiet(case: Case, index: int, model: Axmodel) -> Finding | None:
    """Compares weights, constants and graph of a layer whose outputs agree."""
    file, tensors = case.bundle.layer_path(index).name, stored.read(model)
    for fault in faulty_weights(case, index, tensors):
        changed = _graph(case, index, model) if weight_faults.UNRELATED in fault.cause else None
        return changed or _weight_finding("layers", f"layer {index}, {fault.tensor}", file, [fault], "")
    for constant in constants.differences(model, tensors, case.reference, index):
        return Finding(
            "layers",
            f"layer {index}, {constant.what}",
            file,
            constant.expected,
            constant.seen,
            constant.cause,
            REBUILD,
        )
    return _graph(case, index, model, quiet=True)


def _explained(case: Case, index: int, model: Axmodel, trouble: Trouble) -> Finding | None:
    """Explains a disagreement; None if nothing is wrong and the model is just more sensitive to its types than most."""
    file, tensors = case.bundle.layer_path(index).name, stored.read(model)
    part = f"layer {index}, {trouble.visit.text}, {trouble.output}"
    shown = trouble.text.partition(" has ")[2] or "values that are not finite"
    seen, _, most = shown.partition(", expected ")
    expected = f"the reference's {trouble.output}, error {most or 'finite'}"
    marked = [_mark(entry, trouble) for entry in trouble.measured]
    where = positions.pattern(marked) if _separable(trouble.measured, trouble) else ""
    seen += f"; {where}" if where else ""
    case.say("  comparing its weights with the checkpoint's")
    faults = list(faulty_weights(case, index, tensors))
    if faults and weight_faults.UNRELATED in faults[0].cause and (changed := _graph(case, index, model)) is not None:
        return dataclasses.replace(
            changed, part=part, expected=expected, seen=seen
        )  # the graph interprets the levels differently
    if faults:
        return _weight_finding("layers", part, file, faults, seen, expected)
    for constant in constants.differences(model, tensors, case.reference, index):
        cause = constant.cause
        wanted = f"{expected}; {constant.what}: {constant.expected}"
        return Finding("layers", part, file, wanted, f"{seen}; {constant.seen}", cause, REBUILD)
    if (changed := _graph(case, index, model)) is not None:
        return dataclasses.replace(changed, part=part, expected=expected, seen=seen)
    case.say(f"  the file is right; running engine {case.other_engine}")
    others = _other(case, index)
    if others and find_trouble(case, index, others) is None:
        cause = (
            f"engine {case.engine} computes this layer differently from {case.other_engine}, which agrees with the "
            "reference: the axmodel is right"
        )
        advice = "Install or build the engine again; if that does not help, report it with this output."
        return Finding("layers", part + f", engine {case.engine}", file, expected, seen, cause, advice)
    if cause := _shifted(case, index, trouble):
        return Finding("layers", part, file, expected, seen, cause, REPORT)
    if target_known(case) and others and _sensitive(trouble, others):
        return None
    return Finding("layers", part, file, expected, seen, _guess(case, index, trouble, where), REPORT)


def _graph(case: Case, index: int, model: Axmodel, quiet: bool = False) -> Finding | None:
    """A finding if the graph differs from the one that this compiler writes for the manifest's flags.

    `quiet`: outputs agree. Another compiler's graph is then equally good and only mentioned.
    """
    changed = graph_difference(case, index, model, quiet)
    if not changed:
        return None
    file = case.bundle.layer_path(index).name
    seen = "a different graph"
    return Finding("layers", f"layer {index}, graph", file, "the graph that axc writes", seen, changed, REBUILD)


def graph_difference(case: Case, index: int | None, model: Axmodel, quiet: bool) -> str:
    """The difference in words, for a layer or the post model (`index` None)."""
    target = expected_graphs.target(case.bundle.manifest)
    changed = (
        expected_graphs.graph_difference(model, case.config, target, index, case.kept) if target is not None else ""
    )
    if changed and quiet and not expected_graphs.same_compiler(case.bundle.manifest):
        case.examined.setdefault("other graphs", changed)
        changed = ""
    return changed or unused_tensor(model)


def graph_remark(case: Case) -> str:
    """A clause on different graphs of another compiler whose outputs agree."""
    other = case.examined.get("other graphs")
    return f"; built by another version of axc, which writes different graphs: {other}" if other else ""


def _separable(measured: list[Measured], trouble: Trouble) -> bool:
    """Whether rows are clearly right or wrong, with a gap between the errors."""
    which = OUTPUTS.index(trouble.output)
    errors = np.concatenate([entry.errors[which].error for entry in measured])
    wrong = errors > trouble.limits.rms
    return bool(wrong.all() or not wrong.any() or np.median(errors[wrong]) > APART * errors[~wrong].max())


def _mark(entry: Measured, trouble: Trouble) -> Marked:
    which = OUTPUTS.index(trouble.output)
    return Marked(entry.visit, np.asarray(~(entry.errors[which].error <= trouble.limits.rms)))


def _other(case: Case, index: int) -> list[Measured]:
    """The other engine's measurements of a layer; empty if it cannot load it."""
    try:
        return list(measure(case, index, case.other_engine))
    except BadInput:
        return []


def target_known(case: Case) -> bool:
    """Whether the bundle's graphs can be compared with this compiler's."""
    return expected_graphs.target(case.bundle.manifest) is not None


def _sensitive(trouble: Trouble, others: list[Measured]) -> bool:
    """Whether errors are only slightly above the bounds, and equal in two engines that share no code."""
    for ours, theirs in zip(trouble.measured, others, strict=True):
        if not all(ours.finite) or not all(theirs.finite):
            return False
        for one, other in zip(ours.errors, theirs.errors, strict=True):
            apart = np.abs(one.error - other.error).max(initial=0)
            if one.error.max(initial=0) > SENSITIVE * trouble.limits.row or apart > trouble.limits.rms / 4:
                return False
    return True


def _guess(case: Case, index: int, trouble: Trouble, where: str) -> str:
    """A probable cause if weights, constants and graph are right."""
    if not trouble.finite:
        reached = max(float(np.abs(case.expected.trace.outputs[at]).max()) for at in (index, max(index - 1, 0)))
        if case.bundle.hidden_state_type == "fp16" and reached > 0.5 * LARGEST_FLOAT16:
            return (
                f"float16 overflows: its maximum is {LARGEST_FLOAT16:g}, the reference's hidden states reach "
                f"{reached:.3g}; build with --hidden_state_type bf16 or fp32"
            )
        return "an overflow: weights, constants and graph match the checkpoint"
    reason = f" ({where})" if where else ""
    return f"weights, constants and graph match the checkpoint; probably both engines share a fault{reason}"


def _shifted(case: Case, index: int, trouble: Trouble) -> str:
    """A cause if shifted positions remove most of the error; a shift cannot reduce a mere rounding error."""
    visit = trouble.visit
    layer = Layer(case.bundle.layer_path(index), case.engine, None, case.bundle.hidden_state_type)
    which = OUTPUTS.index(trouble.output)
    before = next(entry.errors[which].error for entry in trouble.measured if entry.visit == visit)
    for shift in (-1, 1):
        again = _measured(case, index, visit, run(case, layer, index, visit, shift)).errors[which].error
        if np.linalg.norm(again) < EXPLAINED * np.linalg.norm(before):
            return f"positions in the file are off by {-shift}: the layer agrees if {shift:+d} is added"
    return ""


def faulty_weights(case: Case, index: int | None, tensors: dict[str, Stored]) -> Iterator[Fault]:
    """Tensors of layer `index` (None: the final norm) that differ from the checkpoint's, in its order."""
    prefixes = NORMS if index is None else (f"model.layers.{index}.",)
    shapes = {name: source.shape for name, source in case.weights.items()}
    wanted = [name for name in shapes if name.startswith(prefixes)]
    foreign = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")} - {str(index)}
    if index is not None and foreign and not any(name in tensors for name in wanted):
        yield Fault(
            f"model.layers.{min(foreign)}", "", f"the file holds layer {', '.join(sorted(foreign))}",
            f"weights of layer {index}", f"weights of layer {', '.join(sorted(foreign))}",
        )  # fmt: skip
        return
    for name in wanted:
        if name not in tensors:
            kind = "bias" if name.endswith(".bias") else "weight"
            yield Fault(name, "", f"the {kind} is missing", f"{list(shapes[name])}", "no such tensor")
            continue
        entry = tensors[name]
        if entry.shape != shapes[name]:
            yield Fault(name, "", "wrong shape", f"{list(shapes[name])}", f"{list(entry.shape)}")
            continue
        if (fault := compared(case, entry, name, index, tensors)) is not None:
            yield fault
    read = cross_check.reads(case.weights)
    for name, shape in case.reference.parameters().items():
        if name.startswith(prefixes) and name not in read:  # tensors that our own reader does not know
            kind = "bias" if name.endswith(".bias") else "weight"
            yield Fault(name, "", f"the {kind} is missing", f"{list(shape)}", "no such tensor")


def compared(case: Case, entry: Stored, name: str, index: int | None, tensors: dict[str, Stored]) -> Fault | None:
    """The difference of a stored tensor, one of `tensors`, from the checkpoint's `name`; None if there is none."""
    if (recorded := case.calibrated.get(name)) is not None and entry.scaled:
        return weight_faults.unlike_calibrated(entry, name, case.weight, recorded.error)
    order = None if entry.order is None else entry.order.array()
    if order is not None and not np.array_equal(np.sort(order), np.arange(entry.shape[1])):
        cause, wanted = "the column order is not a permutation", f"each of 0 to {entry.shape[1] - 1} once"
        return Fault(name, "", cause, wanted, f"{order[:4].tolist()} ...")

    row_order = None if index is None else _row_order(case, name, index, tensors)
    whole = None if row_order is None else case.weight(name)[row_order]
    if order is None and index is not None and (kind := case.kept.get(name)) and kind.reordered:
        order = case.stored.order(kind.tensor)

    def weight(tensor: str, start: int = 0, stop: int | None = None) -> Floats:
        rows = case.weight(tensor, start, stop) if whole is None or tensor != name else whole[start:stop]
        return rows if order is None or tensor != name else np.ascontiguousarray(rows[:, order])

    bad = weight_faults.compare(entry, name, weight)
    if bad is None:
        return None
    config = case.reference.config.get_text_config()
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    turned = head_dim if ".q_proj." in name or ".k_proj." in name else 0
    return weight_faults.explain(entry, name, *bad, weight, _others(case, name, index), turned)


def _row_order(case: Case, name: str, index: int, tensors: dict[str, Stored]) -> NDArray[np.int64] | None:
    """The order of the rows of a weight whose product is the input of a reordered matrix; None if they have their own.

    A file in which that matrix gathers its input has them in their own order.
    """
    followed = case.followed(index).get(name, "")
    gathers = any(kind.tensor == followed and tensors[key].order for key, kind in case.kept.items() if key in tensors)
    return case.stored.order(followed) if followed and not gathers else None


def _others(case: Case, name: str, index: int | None) -> dict[str, str]:
    """Tensors of the same size: in the same layer, of the same kind in other layers, embedding and head."""
    shapes = {name: source.shape for name, source in case.weights.items()}
    size = int(np.prod(shapes[name]))
    alike = [other for other, shape in shapes.items() if other != name and int(np.prod(shape)) == size]
    if index is None:
        return {other: other for other in alike if not other.startswith("model.layers.") or name.startswith(NORMS)}
    own, suffix = f"model.layers.{index}.", name.partition(f".{index}.")[2]
    found = {other: other.removeprefix(own) + " of the same layer" for other in alike if other.startswith(own)}
    for other in alike:
        if other.endswith(f".{suffix}") and other not in found:
            found[other] = f"{suffix} of layer {other.split('.')[2]}"
    return found


def _weight_finding(stage: str, part: str, file: str, faults: list[Fault], seen: str, expected: str = "") -> Finding:
    """One finding for several faulty tensors, e.g. if all are another layer's or another checkpoint's."""
    first = faults[0]
    causes = {fault.cause.rpartition(" of layer ")[2] for fault in faults if " of layer " in fault.cause}
    unrelated = all(weight_faults.UNRELATED in fault.cause for fault in faults)
    if len(faults) > 3 and len(causes) == 1 and all(" of layer " in fault.cause for fault in faults):
        cause = f"the weights are those of layer {causes.pop()}: layers are swapped"
    elif unrelated and len(faults) > 3:
        cause = f"{len(faults)} tensors have different values: probably the weights of another checkpoint"
    else:
        more = f" (and {len(faults) - 1} more: {faults[1].text})" if len(faults) > 1 else ""
        cause = first.text + more
        if unrelated:
            cause += "; probably damaged, or from another checkpoint"
    return Finding(
        stage,
        part,
        file,
        f"{expected}; {first.tensor}: {first.expected}" if expected else first.expected,
        f"{seen}; {first.seen}" if seen else first.seen,
        cause,
        REBUILD,
    )


__all__ = [
    "ENGINES",
    "compared",
    "examine",
    "faulty_weights",
    "find_trouble",
    "graph_difference",
    "graph_remark",
    "measure",
]

"""The stage `layers`: each layer in prefill, with history and in decode, fed with rows of the reference's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from board.agreement import Noise
from board.doctor.constants import constants
from board.doctor.context import Context
from board.doctor.direct import Layer, Result
from board.doctor.figures import WALK
from board.doctor.measured import KEYS, OUTPUT, VALUES, Measured, allowed, compare, odd_columns, pattern, wrong
from board.doctor.report import Finding
from board.doctor.walk import refused
from board.errors import BadInput, Failure

STAGE = "layers"


def layers(context: Context) -> str | Finding:
    """Runs each layer's shape groups by the engine's interface, without the runner's masks and caches."""
    context.expect_runnable()
    bundle, figures = context.bundle, context.figures
    noise, worst = allowed(bundle, figures), 0.0
    for index in range(bundle.layers):
        context.say(f"  layer {index} of {bundle.layers}")
        name = bundle.layer_path(index).name
        try:
            layer = _open(context, index, context.engine)
        except BadInput as failure:
            return refused(STAGE, failure, f"layer {index} does not load", name)
        entries: list[Measured] = []
        results: dict[int, Result] = {}
        for visit in _visits(context):
            try:
                made = results[visit] = _run(context, layer, index, visit)
            except Failure as failure:
                return refused(STAGE, failure, f"layer {index} does not run", name)
            entries += compare(figures, index, visit, made)
        if bad := wrong(entries, noise):
            return _finding(context, index, bad, entries, noise)
        if found := constants(context, STAGE, index) or _columns(context, index, results):
            return found
        worst = max(worst, *(entry.error for entry in entries))
    visits = list(_visits(context))
    return (
        f"{bundle.layers} layers in {len(visits)} visits of {len(bundle.groups)} groups: outputs, K and V within "
        f"{noise.row:.2g}, at worst {worst:.2g}"
    )


def _open(context: Context, index: int, engine: str) -> Layer:
    return Layer(context.bundle.layer_path(index), engine, context.threads, context.bundle.hidden_state_type)


def _visits(context: Context) -> Iterator[int]:
    return (visit for visit, (group, *_) in enumerate(context.figures.visits.tolist()) if group != WALK)


def _run(context: Context, layer: Layer, source: int, visit: int) -> Result:
    """What a layer makes of a visit with the inputs and the history of layer `source`."""
    group, start, count = context.figures.visits[visit].tolist()
    keys, values = context.figures.history(source, start)
    return layer.run(group, start, context.figures.inputs(source, start, start + count), keys, values)


def _finding(
    context: Context, index: int, bad: Sequence[Measured], entries: Sequence[Measured], noise: Noise
) -> Finding:
    order = {KEYS: 0, VALUES: 1, OUTPUT: 2}  # the output follows from the others
    first = min(bad, key=lambda entry: order[entry.what])
    file = context.bundle.layer_path(index).name
    most = noise.row if first.error > noise.row else noise.rms
    cause, advice = pattern(bad, entries), "Build the bundle again; if it stays, report it with this output."
    other = _whose(context, index, noise)
    if other is not None:
        cause = f"it is the axmodel of layer {other}: two layers were swapped, or one was copied over another"
        advice = "Copy or build the bundle again."
    elif beside := _other_engine(context, index, noise):
        file, cause = beside
        advice = "Install axrun again; if it stays, report the engine with this output."
    elif context.other_engine:
        cause += f"; engine {context.other_engine} finds the same"
    return Finding(
        STAGE,
        f"layer {index}, {first.place}, {first.what}",
        file,
        f"the float32 reference's, with an error of at most {most:.2g}",
        f"an error of {first.error:.2g}, cosine {first.cosine:.4f}; {len(bad)} of {len(entries)} rows are wrong",
        cause,
        advice,
    )


def _columns(context: Context, index: int, results: Mapping[int, Result]) -> Finding | None:
    """One wrong row of a matrix is lost in a whole output's error, and stands out in its own column of it."""
    found = odd_columns(context.figures, index, results)
    if not found:
        return None
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return Finding(
        STAGE,
        f"layer {index}, column {found[0]}{more} of its output",
        context.bundle.layer_path(index).name,
        "errors as in the other columns",
        f"far larger ones in {len(found)} of {context.bundle.hidden_size}",
        f"row {found[0]} of down_proj or o_proj is damaged, or has another's scale",
        "Build the bundle again.",
    )


def _whose(context: Context, index: int, noise: Noise) -> int | None:
    """The layer whose figures this axmodel agrees with, in its first visit."""
    figures, visit = context.figures, next(_visits(context))
    layer = _open(context, index, context.engine)
    for other in range(context.bundle.layers):
        if other == index:
            continue
        made = _run(context, layer, other, visit)
        if not wrong(compare(figures, other, visit, made), noise):
            return other
    return None


def _other_engine(context: Context, index: int, noise: Noise) -> tuple[str, str] | None:
    """File and cause where an engine that shares no code agrees with the figures."""
    other = context.other_engine
    if not other:
        return None
    try:
        layer = _open(context, index, other)
        entries = [
            entry
            for visit in _visits(context)
            for entry in compare(context.figures, index, visit, _run(context, layer, index, visit))
        ]
    except Failure:
        return None
    if wrong(entries, noise):
        return None
    library = "libax_engine.so" if context.engine.startswith("ax") else "onnxruntime"
    return library, f"the engine: {other} agrees with the reference on the same axmodel"

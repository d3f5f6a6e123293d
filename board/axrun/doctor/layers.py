"""The stage `layers`: runs each layer in prefill, with history and in decode on reference inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from axrun.agreement import Noise
from axrun.doctor.constants import constants
from axrun.doctor.context import Context
from axrun.doctor.direct import Floats, Layer, Result
from axrun.doctor.figures import WALK
from axrun.doctor.report import Finding
from axrun.doctor.row_errors import (
    KEYS,
    OUTPUT,
    VALUES,
    RowError,
    allowed,
    compare,
    expected,
    pattern,
    wrong,
    wrong_channels,
)
from axrun.doctor.stages import refused
from axrun.errors import BadInput, Failure

STAGE = "layers"
ORDER = {KEYS: 0, VALUES: 1, OUTPUT: 2}  # the output depends on the others


def layers(context: Context) -> str | Finding:
    """Runs the shape groups of each layer directly, without the runner's masks and cache."""
    context.expect_runnable()
    bundle, figures = context.bundle, context.figures
    noise, worst = allowed(bundle, figures), 0.0
    for index in range(bundle.layers):
        context.say(f"  layer {index} of {bundle.layers}")
        name = bundle.layer_path(index).name
        try:
            layer = _open(context, index, context.engine)
        except BadInput as failure:
            return constants(context, STAGE, index) or refused(STAGE, failure, f"layer {index} does not load", name)
        entries: list[RowError] = []
        outputs = []
        for visit in _visits(context):
            try:
                made = _run(context, layer, index, visit)
            except Failure as failure:
                return refused(STAGE, failure, f"layer {index} does not run", name)
            entries += compare(figures, index, visit, made)
            outputs.append(_outputs(context, index, visit, made))
        bad = wrong(entries, noise)
        channels = wrong_channels(outputs, figures.hidden_type)
        if (bad or channels) and (found := constants(context, STAGE, index)):
            return _with_rows(found, index, bad, entries)
        if channels and {entry.what for entry in bad} <= {OUTPUT}:
            return _channels(name, index, channels, outputs)
        if bad:
            return _finding(context, index, bad, entries, noise)
        if found := constants(context, STAGE, index):
            return found
        worst = max(worst, *(entry.error for entry in entries))
    visits = list(_visits(context))
    return (
        f"{bundle.layers} layers, {len(visits)} runs of {len(bundle.groups)} groups: outputs, K and V; "
        f"largest error {worst:.2g}, allowed {noise.row:.2g}"
    )


def _with_rows(found: Finding, index: int, bad: Sequence[RowError], entries: Sequence[RowError]) -> Finding:
    """Adds the wrong rows to a finding of the exact checks."""
    if not bad:
        return found
    first = min(bad, key=lambda entry: ORDER[entry.what])
    part = f"layer {index}, {first.place}, {first.what}"
    return dataclasses.replace(found, part=part, cause=f"{found.cause}; {pattern(bad, entries)}")


def _outputs(context: Context, index: int, visit: int, made: Result) -> tuple[Floats, Floats, Floats]:
    """Outputs, expected updates and inputs at the probes of a visit: [n, H] each."""
    figures = context.figures
    _, start, count = figures.visits[visit].tolist()
    probes = figures.of_visit(visit)
    inside = figures.probes[probes, 1].astype(int) - start
    given = figures.inputs(index, start, start + count)[inside]
    return made.output[inside], expected(figures, index, probes).updates, given


def _channels(
    file: str, index: int, channels: Sequence[int], outputs: Sequence[tuple[Floats, Floats, Floats]]
) -> Finding:
    ours, updates, given = (rows[0] for rows in outputs[0])
    first = channels[0]
    return Finding(
        STAGE,
        f"layer {index}, channel {first} of the output" + f" and {len(channels) - 1} more" * (len(channels) > 1),
        file,
        f"the layer adds {updates[first]:.4g}",
        f"the layer adds {ours[first] - given[first]:.4g}; the other channels agree",
        "a row of down_proj or o_proj is damaged, or has the scale of another row",
        "Copy or build the bundle again; `axc doctor` compares the weights themselves.",
    )


def _open(context: Context, index: int, engine: str) -> Layer:
    return Layer(context.bundle.layer_path(index), engine, context.threads, context.bundle.hidden_state_type)


def _visits(context: Context) -> Iterator[int]:
    return (visit for visit, (group, *_) in enumerate(context.figures.visits.tolist()) if group != WALK)


def _run(context: Context, layer: Layer, source: int, visit: int) -> Result:
    """Runs a visit with the inputs and the history of layer `source`."""
    group, start, count = context.figures.visits[visit].tolist()
    keys, values = context.figures.history(source, start)
    return layer.run(group, start, context.figures.inputs(source, start, start + count), keys, values)


def _finding(
    context: Context, index: int, bad: Sequence[RowError], entries: Sequence[RowError], noise: Noise
) -> Finding:
    first = min(bad, key=lambda entry: ORDER[entry.what])
    file = context.bundle.layer_path(index).name
    most = noise.row if first.error > noise.row else noise.rms
    cause, advice = pattern(bad, entries), "Build the bundle again; if the error persists, report it with this output."
    other = _matching_layer(context, index, noise)
    if other is not None:
        cause = f"it is the axmodel of layer {other}: two layers were swapped, or one was copied over another"
        advice = "Copy or build the bundle again."
    elif beside := _other_engine(context, index, noise):
        file, cause = beside
        advice = "Install axrun again; if the error persists, report the engine with this output."
    elif context.other_engine:
        cause += f"; engine {context.other_engine} gives the same result"
    return Finding(
        STAGE,
        f"layer {index}, {first.place}, {first.what}",
        file,
        f"a relative error of at most {most:.2g} against the float32 reference",
        f"{first.error:.2g}, cosine {first.cosine:.4f}; {len(bad)} of {len(entries)} rows are wrong",
        cause,
        advice,
    )


def _matching_layer(context: Context, index: int, noise: Noise) -> int | None:
    """The layer whose figures this axmodel matches in its first visit, if any."""
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
    """File and cause if an independent engine agrees with the figures."""
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
    return library, f"the engine is at fault: {other} agrees with the reference on the same axmodel"

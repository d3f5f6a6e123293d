"""The stage `cache`: runs the layers with the runner's own chunks, masks and KV cache."""

from __future__ import annotations

from collections.abc import Iterator

from axrun.decoder import Decoder
from axrun.doctor.context import OURS, Context
from axrun.doctor.direct import Layer, Result
from axrun.doctor.figures import WALK
from axrun.doctor.replay import difference, kept
from axrun.doctor.report import Finding
from axrun.doctor.row_errors import KEYS, OUTPUT, VALUES, allowed, compare, wrong
from axrun.doctor.runner import runner
from axrun.doctor.stages import NotExamined, refused
from axrun.errors import Failure
from axrun.format import axmodel
from axrun.format.bundle import Bundle
from axrun.session import open_session

STAGE = "cache"
DECODER = "axrun: board/axrun/decoder.py"
INSTALL = "Install or deploy axrun again: its files differ from the release, or the engine runs chunks wrongly."
DECODED = 3  # tokens run one at a time, after the first prefill and at the end


def expect_caches(bundle: Bundle) -> None:
    """Raises NotExamined if a layer keeps nothing between tokens: the dummy layers all have caches."""
    if bundle.maker != OURS:
        return
    layers = [index for index in range(bundle.layers) if not axmodel.read(bundle.layer_path(index)).caches]
    if layers:
        raise NotExamined(f"layers {', '.join(map(str, layers[:4]))} keep nothing between tokens; not supported here")


def cache(context: Context) -> str | Finding:
    """Checks the runner's masks, positions and cache rows with dummy layers; then runs a token sequence through each
    layer alone, and compares outputs and cache.
    """
    context.expect_runnable()
    bundle = context.bundle
    expect_caches(bundle)
    try:
        fault = runner(open_session(bundle.layer_path(0), context.engine, context.threads), bundle)
    except Failure as failure:
        return refused(STAGE, failure, "layer 0 does not load", bundle.layer_path(0).name)
    if fault is not None:
        cause = f"the runner is at fault, not the layers: {fault.cause}"
        return Finding(STAGE, fault.part, f"axrun: {fault.file}", fault.expected, fault.seen, cause, INSTALL)
    figures = context.figures
    walks = [visit for visit, (group, *_) in enumerate(figures.visits.tolist()) if group == WALK]
    if not walks:
        raise NotExamined("the figures have no token sequence for the cache")
    visit, noise = walks[0], allowed(bundle, figures)
    count = int(figures.visits[visit][2])
    for index in range(bundle.layers):
        context.say(f"  cache of layer {index} of {bundle.layers}")
        try:
            session = open_session(bundle.layer_path(index), context.engine, context.threads)
            hidden = figures.inputs(index, 0, count)
            decoder = Decoder([session])
            layer = Layer(bundle.layer_path(index), context.engine, context.threads, figures.hidden_type, session)
            ours = bundle.maker == OURS
            outputs, differing = difference(decoder, layer, hidden, steps(count, bundle.prefill_len), ours)
        except Failure as failure:
            return refused(STAGE, failure, f"layer {index} with its cache", bundle.layer_path(index).name)
        if differing is not None:
            return Finding(
                STAGE,
                f"layer {index}, {differing.place}",
                DECODER,
                differing.expected,
                differing.seen,
                f"the layer is right when called directly, so the runner is at fault: {differing.cause}",
                INSTALL,
            )
        keys, values = kept(decoder)
        entries = compare(figures, index, visit, Result(keys[:count], values[:count], outputs))
        if bad := wrong(entries, noise):
            first = bad[0]
            stored = {entry.what for entry in bad} & {KEYS, VALUES}
            cause = (
                "rows are written to the wrong positions"
                if stored
                else "the rows in the cache are right but read wrongly: a wrong mask, or a wrong start of a chunk"
            )
            if OUTPUT not in {entry.what for entry in bad}:
                cause = "rows were changed after the layer returned them, or written to the wrong positions"
            return Finding(
                STAGE,
                f"layer {index}, {first.what} at position {first.position} of {count} tokens in the runner's chunks",
                DECODER,
                f"a relative error of at most {noise.row:.2g} against the float32 reference",
                f"{first.error:.2g}; the layer called directly is within it",
                cause,
                INSTALL,
            )
    return f"{bundle.layers} layers over {count} tokens in prefill, with history and in decode: K, V and output agree"


def steps(count: int, prefill: int) -> Iterator[tuple[int, int]]:
    """The steps (start, stop): a prefill, single tokens, a short prefill, full prefill chunks, and single tokens."""
    end = max(count - DECODED, 1)
    first = min(prefill or 1, end)
    again = min(first + DECODED, end)
    yield 0, first
    yield from ((at, at + 1) for at in range(first, again))
    chunk = prefill or 1
    starts = sorted({again, *range(-(-again // chunk) * chunk, end, chunk)} if again < end else ())
    yield from zip(starts, [*starts[1:], end])
    yield from ((at, at + 1) for at in range(end, count))

"""Stage `cache`: the runner's own decoder over the walk, one layer at a time, and the K/V rows it leaves in the cache.

The layers agree by themselves when this is examined, so what disagrees here is the runner's: its masks, positions,
chunks, or where it puts rows. Which, is found by giving the layer a mask or positions that are wrong in a known way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from board.axmodel import BLOCKED
from board.decoder import Decoder
from board.doctor.report import Finding
from board.doctor.walk import NotExamined
from board.dtypes import to_float32
from board.errors import CheckFailed
from board.session import open_session
from toolchain import walk
from toolchain.agreement import RISE, Agreement, update_errors
from toolchain.check import through
from toolchain.doctor.case import Case
from toolchain.doctor.direct import Layer, Visit, causal
from toolchain.doctor.layers import PER_POSITION, relative
from toolchain.doctor.stored import Floats
from toolchain.walk import Step

MATCH = 1e-2  # relative error of outputs that come of the same mask and positions, beside the reference's
DECODER = "board/decoder.py"
INSTALL = "Install axrun again; if it stays, report it with this output."


class Slip(NamedTuple):
    """A way in which a runner can be wrong: what it is, its mask, and what it adds to positions."""

    text: str
    mask: Floats
    shift: int = 0


def examine(case: Case) -> str | Finding:
    """Every layer over the walk; leaves the hidden states behind the last layer in `case.examined`."""
    bundle = case.bundle
    if bundle.maker != "cpu":
        raise NotExamined("needs a board with an NPU: run `axrun doctor` there")
    expected = case.expected
    assert expected.rows is not None
    steps = list(walk.steps(bundle.prefill_len, len(expected.ids)))
    answer = expected.answer
    ids = answer.asked + answer.tokens[:-1] if answer else []
    turns = [Step("prefill", 0, len(answer.asked))] if answer else []
    turns += [Step("decode", at, at + 1) for at in range(turns[0].stop if turns else 0, len(ids))]
    from board.model import Embedding

    embedding = Embedding(bundle.embedding_path, bundle.vocab_size, bundle.hidden_size, case.dtype)
    walked = to_float32(embedding(expected.ids.tolist()), case.dtype)
    answered = to_float32(embedding(ids), case.dtype)
    for index in range(bundle.layers):
        case.say(f"  layer {index + 1} of {bundle.layers}")
        decoder = Decoder([open_session(bundle.layer_path(index), case.engine)])
        finding = _layer(case, decoder, index, steps)
        if finding is not None:
            return finding
        walked = through(decoder, steps, walked)
        answered = through(decoder, turns, answered)
    case.examined["walk"], case.examined["answer"] = walked, answered
    kinds = ", ".join(dict.fromkeys(step.stage for step in steps))
    return f"{len(expected.ids)} rows of K and V in {bundle.layers} layers after {kinds}"


def _layer(case: Case, decoder: Decoder, index: int, steps: list[Step]) -> Finding | None:
    expected, bundle = case.expected, case.bundle
    noise = case.noise(bundle.flag("weight_type") or "s4")
    given, wanted = expected.trace.inputs[index], expected.trace.outputs[index]
    alone = {entry.stage: entry.rms for entry in case.examined.get("layers", ()) if entry.part == f"layer {index}"}
    for step in steps:
        part = slice(step.start, step.stop)
        try:
            out = decoder.forward(given[part], step.start)
        except CheckFailed as failed:
            return _finding(case, index, step, out=None, seen=str(failed).partition("\n")[0], expected="finite values")
        rows = update_errors(out, wanted[part], given[part], bundle.hidden_state_type)
        measured = Agreement.of(f"layer {index}", step.stage, rows)
        fault = measured.fault(noise)
        most = RISE * 2 * max(alone.values(), default=np.inf)
        if not fault and len(rows.error) > 8 and measured.rms > max(most, 1e-4):
            fault = f"it has error {measured.rms:.2e}, expected at most {most:.2e}, which the layer has by itself"
        if fault:
            seen, _, limit = fault.partition(" has ")[2].partition(", expected ")
            return _finding(case, index, step, out, seen, f"the reference's output, error {limit}")
        finding = _rows(case, decoder, index, step)
        if finding is not None:
            return finding
    return None


def _rows(case: Case, decoder: Decoder, index: int, step: Step) -> Finding | None:
    """The cache's rows [0, step.stop) beside the reference's."""
    assert case.expected.rows is not None
    noise = case.noise(case.bundle.flag("weight_type") or "s4")
    kept = decoder.cache.keys[0], decoder.cache.values[0]
    for name, buffer, wanted in zip("KV", kept, case.expected.rows[index], strict=True):
        seen = to_float32(buffer[0, : step.stop], decoder.dtype)
        errors = relative(seen, wanted[: step.stop])
        limits = noise.row + PER_POSITION * step.stop
        bad = np.flatnonzero(~(errors.error <= limits))
        if not len(bad):
            continue
        row = int(bad[0])
        return Finding(
            "cache",
            f"layer {index}, row {row} of {name} after {step.stage} of tokens {step.start} to {step.stop - 1}",
            DECODER,
            f"the reference's row, error at most {limits:.2g}",
            f"error {errors.error[row]:.2g}; {len(bad)} of {step.stop} rows differ",
            _misplaced(case, index, name, seen, row),
            INSTALL,
        )
    return None


def _misplaced(case: Case, index: int, name: str, seen: Floats, row: int) -> str:
    """What a row of the cache holds instead."""
    assert case.expected.rows is not None
    keys, values = case.expected.rows[index]
    wanted = (keys if name == "K" else values)[row]
    if not seen[row].any():
        scores = seen @ wanted / (np.linalg.norm(seen, axis=1) * np.linalg.norm(wanted) + 1e-30)
        best = int(np.argmax(scores))
        if scores[best] > 0.98:
            return f"{name} of position {row} lies in row {best}: rows are put in the wrong place"
        return f"the row of {name} was not written, or was cleared"
    for called, rows in (("K", keys), ("V", values)):
        scores = rows @ seen[row] / (np.linalg.norm(rows, axis=1) * np.linalg.norm(seen[row]) + 1e-30)
        best = int(np.argmax(scores))
        if scores[best] > 0.98:
            return f"the row holds {called} of position {best}: rows are put or kept in the wrong place"
    return f"probably rows of {name} are overwritten, or kept from another sequence"


def _finding(case: Case, index: int, step: Step, out: Floats | None, seen: str, expected: str) -> Finding:
    what = f"tokens {step.start} to {step.stop - 1}" if step.stop - step.start > 1 else f"token {step.start}"
    return Finding(
        "cache",
        f"layer {index}, {step.stage} of {what}, output",
        DECODER,
        expected,
        seen,
        "the layer agrees by itself, so the runner is at fault: "
        + ("it gives values that are not finite" if out is None else _slipped(case, index, step, out)),
        INSTALL,
    )


def _slipped(case: Case, index: int, step: Step, out: Floats) -> str:
    """Which mask or which positions bring the layer to what the runner got."""
    layer = Layer(case.bundle.layer_path(index), case.engine, case.bundle.hidden_state_type)
    visits = _visits(layer, step)
    if not visits:
        return "probably how it cuts a prompt into chunks"
    assert case.expected.rows is not None
    keys, values = case.expected.rows[index]
    count = sum(visit.tokens for visit in visits)
    given = case.expected.trace.inputs[index]

    def outputs(slip: Slip) -> Floats:
        rows = []
        for visit in visits:
            start, first = visit.start, visit.start - step.start
            mask = slip.mask[first : first + visit.tokens, : start + visit.tokens]
            hidden = given[start : start + visit.tokens]
            rows.append(layer.run(visit, hidden, keys[:start], values[:start], slip.shift, mask).output)
        return np.concatenate(rows)

    update = np.linalg.norm(out[:count] - given[step.start : step.start + count]) or 1.0
    best, least = "probably its mask or its positions", np.inf
    for slip in slips(step.start, count):
        error = float(np.linalg.norm(outputs(slip) - out[:count]) / update)
        if error < least:
            best, least = slip.text, error
    right = outputs(Slip("", causal(step.start, count)))
    usual = float(np.linalg.norm(right - out[:count]) / update)
    if least < 0.5 * usual:
        return best
    return (
        "probably its mask, its positions, or how it cuts a prompt into chunks"
        if usual > MATCH
        else "probably rounding"
    )


def _visits(layer: Layer, step: Step) -> list[Visit]:
    """The prefill group that holds a step, as much of it as fits; without one, token by token in a decode group."""
    count = step.stop - step.start
    prefill = [group for group in layer.session.groups if group.history >= step.start and group.tokens > 1]
    if prefill and count > 1:
        group = min(prefill, key=lambda group: group.history)
        return [Visit(step.stage, group.index, step.start, min(group.tokens, count))]
    decode = [group for group in layer.session.groups if group.history >= step.stop - 1 and group.tokens == 1]
    return [Visit(step.stage, decode[0].index, at, 1) for at in range(step.start, step.stop) if decode]


def slips(start: int, count: int) -> Iterator[Slip]:
    """Masks and positions that are wrong in ways that have been seen."""
    right = causal(start, count)
    rows = np.arange(count)
    if start:
        last = right.copy()
        last[:, start - 1] = BLOCKED
        yield Slip("its mask hides the last row of history: off by one", last)
        first = right.copy()
        first[:, 0] = BLOCKED
        yield Slip("its mask hides the first row of history", first)
        none = right.copy()
        none[:, :start] = BLOCKED
        yield Slip("its mask hides all history", none)
        half = right.copy()
        half[:, : start // 2] = BLOCKED
        yield Slip("its mask hides the earlier half of the history: as a window would", half)
        own = right.copy()
        own[0, start] = BLOCKED
        yield Slip("its mask hides the first token of a chunk from itself", own)
    if count > 1:
        ahead = right.copy()
        ahead[rows[:-1], start + rows[:-1] + 1] = 0
        yield Slip("its mask lets a token see the next one: off by one", ahead)
        yield Slip("its mask lets every token see all others: it is not causal", np.zeros_like(right))
        behind = right.copy()
        behind[rows[1:], start + rows[1:] - 1] = BLOCKED
        yield Slip("its mask hides the token before: off by one", behind)
    for shift in (1, -1):
        yield Slip(f"the positions it gives are off by {shift:+d}", right, shift)
    if start:
        yield Slip("the positions it gives begin at 0 behind a history", right, -start)


__all__ = ["examine", "slips"]

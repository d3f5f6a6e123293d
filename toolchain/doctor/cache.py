"""Stage `cache`: the runner's own decoder over the walk, one layer at a time, and the K/V rows it leaves in the cache.

The layers agree by themselves when this is examined, so what disagrees here is the runner's: its masks, positions,
chunks, or where it puts rows. Which, is found by giving the layer a mask or positions that are wrong in a known way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from board.agreement import LEAST_UPDATE, ROUNDING, SMALLEST
from board.axmodel import BLOCKED
from board.decoder import Decoder
from board.doctor.direct import Layer, Result, causal
from board.doctor.report import Finding
from board.doctor.walk import NotExamined
from board.dtypes import to_float32
from board.errors import CheckFailed
from board.session import open_session
from toolchain import walk
from toolchain.check import through
from toolchain.doctor.case import Case
from toolchain.doctor.layers import relative
from toolchain.doctor.stored import Floats
from toolchain.doctor.visits import Visit
from toolchain.walk import Step

# of a layer's update: what the order of sums changes between two runs of one engine, 4 times what was measured
SAME = {"bf16": 5e-3, "fp16": 5e-3}
USUALLY = 1e-3  # for any other weight type
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
    """The decoder beside the layer by itself, which gets the decoder's history and masks of its own."""
    bundle, given = case.bundle, case.expected.trace.inputs[index]
    layer = Layer(bundle.layer_path(index), case.engine, None, bundle.hidden_state_type)
    most = SAME.get(bundle.flag("weight_type"), USUALLY)
    for step in steps:
        visits = _visits(layer, step)
        before = kept(decoder, step.start)
        try:
            out = decoder.forward(given[step.start : step.stop], step.start)
        except CheckFailed as failed:
            seen = str(failed).partition("\n")[0]
            return _finding(index, step, "output", "finite values", seen, "it gives values that are not finite")
        count = sum(visit.tokens for visit in visits)
        if not count:
            continue
        replayed = replay(layer, visits, given, before, Slip("", causal(step.start, count)))
        part = given[step.start : step.start + count]
        error = _apart(out[:count], replayed.output, part, bundle.hidden_state_type)
        if not error.max() <= most:
            row = step.start + int(np.argmax(~(error <= most)))
            seen = f"they differ by {error.max():.2g} of the layer's update, first at token {row}"
            cause = _slipped(layer, visits, given, before, out[:count], replayed.output)
            expected = f"what the layer gives by itself, to {most:g} of its update"
            return _finding(index, step, "output", expected, seen, cause)
        finding = _rows(case, decoder, index, step, before, replayed)
        if finding is not None:
            return finding
    return None


def kept(decoder: Decoder, count: int) -> tuple[Floats, Floats]:
    """K and V of positions [0, count) in the cache of a single layer."""
    keys, values = (rows[0][0, :count] for rows in (decoder.cache.keys, decoder.cache.values))
    return to_float32(keys, decoder.dtype).copy(), to_float32(values, decoder.dtype).copy()


def replay(layer: Layer, visits: list[Visit], given: Floats, history: tuple[Floats, Floats], slip: Slip) -> Result:
    """What a layer gives for the tokens of `visits`, one after another, behind rows K and V of a history."""
    keys, values = history
    first, results = visits[0].start, []
    for visit in visits:
        start, row = visit.start, visit.start - first
        mask = slip.mask[row : row + visit.tokens, : start + visit.tokens]
        found = layer.run(visit.group, start, given[start : start + visit.tokens], keys, values, slip.shift, mask)
        keys, values = np.concatenate([keys, found.keys]), np.concatenate([values, found.values])
        results.append(found.output)
    return Result(keys[first:], values[first:], np.concatenate(results))


@np.errstate(all="ignore")
def _apart(seen: Floats, wanted: Floats, given: Floats, hidden_type: str) -> NDArray[np.float64]:
    """How far rows [n, H] lie apart, beyond a flip of the last bit, relative to the layer's update: [n]."""
    difference = np.abs(seen.astype(np.float64) - wanted)
    excess = np.maximum(difference - 2.01 * ROUNDING[hidden_type] * np.abs(wanted) - 2 * SMALLEST[hidden_type], 0)
    update = np.linalg.norm(wanted.astype(np.float64) - given, axis=1)
    error = np.linalg.norm(excess, axis=1) / np.maximum(update, LEAST_UPDATE * np.linalg.norm(wanted, axis=1))
    return np.where(np.isfinite(error), error, np.inf)


def _rows(
    case: Case, decoder: Decoder, index: int, step: Step, before: tuple[Floats, Floats], replayed: Result
) -> Finding | None:
    """The cache's rows beside those of the layer by itself; what was there before stays."""
    after = kept(decoder, step.start + len(replayed.keys))
    width = SAME.get(case.bundle.flag("weight_type"), USUALLY) + 2 * ROUNDING[case.bundle.hidden_state_type]
    for name, seen, old, new in zip("KV", after, before, (replayed.keys, replayed.values), strict=True):
        errors = relative(seen, np.concatenate([old, new])).error
        bad = np.flatnonzero(~(errors <= width))
        if not len(bad):
            continue
        row = int(bad[0])
        what = "the row as it was before" if row < step.start else "the row that the layer gives by itself"
        text = f"it differs by {errors[row]:.2g}; {len(bad)} of {len(errors)} rows do"
        cause = _misplaced(case, index, name, seen, row)
        return _finding(index, step, f"row {row} of {name} in the cache", what, text, cause)
    return None


def _misplaced(case: Case, index: int, name: str, seen: Floats, row: int) -> str:
    """What a row of the cache holds instead."""
    assert case.expected.rows is not None
    keys, values = case.expected.rows[index]
    wanted = (keys if name == "K" else values)[row]
    if not seen[row].any():
        best = _alike(seen, wanted)
        if best is not None:
            return f"{name} of position {row} lies in row {best}: rows are put in the wrong place"
        return f"the row of {name} was not written, or was cleared"
    for called, rows in (("K", keys), ("V", values)):
        best = _alike(rows, seen[row])
        if best is not None and (called, best) != (name, row):
            return f"the row holds {called} of position {best}: rows are put or kept in the wrong place"
    return f"probably rows of {name} are overwritten, or kept from another sequence"


def _alike(rows: Floats, wanted: Floats) -> int | None:
    """The row that points the same way; None where none does."""
    scores = rows @ wanted / (np.linalg.norm(rows, axis=1) * np.linalg.norm(wanted) + 1e-30)
    best = int(np.argmax(scores))
    return best if scores[best] > 0.98 else None


def _finding(index: int, step: Step, what: str, expected: str, seen: str, cause: str) -> Finding:
    tokens = f"tokens {step.start} to {step.stop - 1}" if step.stop - step.start > 1 else f"token {step.start}"
    part = f"layer {index}, {step.stage} of {tokens}, {what}"
    cause = f"the layer agrees by itself, so the runner is at fault: {cause}"
    return Finding("cache", part, DECODER, expected, seen, cause, INSTALL)


def _slipped(
    layer: Layer, visits: list[Visit], given: Floats, history: tuple[Floats, Floats], out: Floats, right: Floats
) -> str:
    """Which mask or which positions bring the layer to what the runner got."""
    usual = float(np.linalg.norm(right - out))
    best, least = "", np.inf
    for slip in slips(visits[0].start, len(out)):
        error = float(np.linalg.norm(replay(layer, visits, given, history, slip).output - out))
        if error < least:
            best, least = slip.text, error
    return best if least < 0.5 * usual else "probably its mask, its positions, or how it cuts a prompt into chunks"


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

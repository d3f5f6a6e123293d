"""Stage `cache`: checks the runner's masks, positions and KV cache, then its decoder over the walk, layer by layer.

Masks, positions and cached rows of every position are first compared as data, without running the model. Then layers
run. The stage `layers` has shown that each layer alone agrees, so a disagreement here is the runner's fault: masks,
positions, chunks, or misplaced rows. To find out which, the layer is run with known faults of masks and positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from axc import walk
from axc.check import through
from axc.doctor.case import Case
from axc.walk import Step
from axrun.decoder import Decoder
from axrun.doctor.cache import expect_caches
from axrun.doctor.direct import Floats, Layer
from axrun.doctor.replay import Rows, difference, kept
from axrun.doctor.report import Finding
from axrun.doctor.runner import runner
from axrun.doctor.stages import NotExamined
from axrun.format.dtypes import to_float32
from axrun.model import Embedding
from axrun.session import open_session

DECODER = "board/axrun/decoder.py"
INSTALL = "Install axrun again; if that does not help, report it with this output."
FEW = 4  # tokens of the walk to decode if there is no answer


class Spoken(NamedTuple):
    """A prompt of `asked` tokens and its answer, computed layer by layer, each layer alone in a decoder.

    `hidden` [n, H] is the last layer's output; `rows` are K and V of each layer.
    """

    ids: list[int]
    asked: int
    hidden: Floats
    rows: list[Rows]


def examine(case: Case) -> str | Finding:
    """Runs every layer over the walk; stores the last layer's output, and `Spoken`, in `case.examined`."""
    bundle = case.bundle
    if bundle.maker != "cpu":
        raise NotExamined("needs a board with an NPU: run `axrun doctor` there")
    expect_caches(bundle)
    expected = case.expected
    if (fault := runner(open_session(bundle.layer_path(0), case.engine), bundle)) is not None:
        cause = f"the runner is at fault, not the layers: {fault.cause}"
        return Finding("cache", fault.part, fault.file, fault.expected, fault.seen, cause, INSTALL)
    steps = [*walk.steps(bundle.prefill_len, len(expected.ids)), *_aligned(bundle.prefill_len, len(expected.ids))]
    ids, asked = _spoken(case)
    turns = [Step("prefill", 0, asked), *(Step("decode", at, at + 1) for at in range(asked, len(ids)))]
    embedding = Embedding(bundle.embedding_path, bundle.vocab_size, bundle.hidden_size, case.dtype)
    walked = to_float32(embedding(expected.ids.tolist()), case.dtype)
    answered = to_float32(embedding(ids), case.dtype)
    rows = []
    for index in range(bundle.layers):
        case.say(f"  layer {index + 1} of {bundle.layers}")
        path = bundle.layer_path(index)
        session = open_session(path, case.engine)
        decoder, layer = Decoder([session]), Layer(path, case.engine, None, bundle.hidden_state_type, session)
        given = expected.trace.inputs[index]
        _, differing = difference(decoder, layer, given, [(step.start, step.stop) for step in steps])
        if differing is not None:
            cause = f"the layer alone agrees, so the runner is at fault: {differing.cause}"
            part = f"layer {index}, {differing.place}"
            return Finding("cache", part, DECODER, differing.expected, differing.seen, cause, INSTALL)
        walked = through(decoder, steps, walked)
        answered = through(decoder, turns, answered)
        keys, values = kept(decoder)
        rows.append((keys[: len(ids)], values[: len(ids)]))
    case.examined["walk"], case.examined["spoken"] = walked, Spoken(ids, asked, answered, rows)
    kinds = ", ".join(dict.fromkeys(step.stage for step in steps))
    return f"all masks and positions; {len(expected.ids)} rows of K and V in {bundle.layers} layers after {kinds}"


def _aligned(prefill: int, count: int) -> Iterator[Step]:
    """A rollback to a chunk boundary of a long prompt, and two chunks from there."""
    start = (count // prefill - 2) * prefill if prefill else 0
    if start > 0:
        yield Step("rollback", start, start + 2 * prefill)


def _spoken(case: Case) -> tuple[list[int], int]:
    """The ids of prompt and reference answer, and the number of prompt ids."""
    answer = case.expected.answer
    if answer:
        return answer.asked + answer.tokens[:-1], len(answer.asked)
    ids = case.expected.ids[: max(case.bundle.prefill_len, 1) + FEW].tolist()
    return ids, max(len(ids) - FEW, 1)


__all__ = ["Spoken", "examine"]

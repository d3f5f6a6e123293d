"""Stage `post`: compares the final norm, the head, and the other outputs of the post model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from axc import expected_graphs
from axc.doctor import constants, stored, weight_faults
from axc.doctor.case import REBUILD, REPORT, Case
from axc.doctor.layers import SENSITIVE, faulty_weights, graph_difference, graph_remark
from axc.doctor.stored import Floats, Stored
from axc.doctor.weight_faults import Fault
from axrun.agreement import Agreement, Rows, logit_errors
from axrun.doctor.report import Finding
from axrun.doctor.stages import NotExamined, refused
from axrun.errors import BadInput, CheckFailed
from axrun.format import axmodel
from axrun.format.dtypes import from_float32, to_float32
from axrun.model import Post
from axrun.session import Array, Session, open_session

MOST_ROWS = 160  # rows of logits to compare: 0.1 s each for a vocabulary of 150 000
ROWS = 32  # per batch
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
EVEN = 16.0  # largest ratio of a row's error to the median if only rounding is at work
SMALL = 4096  # vocabularies up to this size are compared completely
SUMS = 0.01  # relative error of logits allowed for another summation order
TIE = 1e-6  # probabilities closer than this count as equal


def examine(case: Case) -> str | Finding:
    """Logits for the reference's last hidden states; then norm, head and epsilon; then top-k."""
    bundle = case.bundle
    if bundle.maker != "cpu":
        raise NotExamined("needs a board with an NPU: run `axrun doctor` there")
    file, noise = bundle.post_file, case.noise(bundle.flag("post_weight_type") or "s4")
    model = axmodel.read(bundle.post_path)
    tensors = stored.read(model)
    try:
        if (differing := _runners(case)) is not None:
            return differing
        measured, even = _measured(case, case.engine)
        fault, text = measured.fault(noise), f"error {measured.rms:.1e}, largest {measured.worst:.1e}"
    except BadInput as failure:
        found = refused("post", failure, "the post model does not load", file)
        changed = graph_difference(case, None, model, quiet=False)
        return dataclasses.replace(found, cause=changed, advice=REBUILD) if changed else found
    except CheckFailed as failed:
        fault, text = f"post has {str(failed).partition(chr(10))[0]}", ""
    part, expected, seen = "logits", "the reference's logits", text
    if fault:
        seen, _, most = fault.partition(" has ")[2].partition(", expected ")
        expected += f", error {most or 'finite'}"
    case.say("  comparing its weights with the checkpoint's")
    for weight in (*faulty_weights(case, None, tensors), *_head(case, tensors)):
        where = part if fault else weight.tensor
        if not fault:
            expected, seen = weight.expected, weight.seen
        cause = weight.text
        return Finding("post", where, file, expected, seen, cause, REBUILD)
    for constant in constants.differences(model, tensors, case.reference, None):
        where = part if fault else constant.what
        return Finding("post", where, file, constant.expected, constant.seen, constant.cause, REBUILD)
    if changed := graph_difference(case, None, model, quiet=not fault):
        where = part if fault else "graph"
        return Finding("post", where, file, "the graph that axc writes", "a different graph", changed, REBUILD)
    if fault and _other_agrees(case):
        cause = f"engine {case.engine} computes the post model differently from {case.other_engine}, which agrees"
        advice = "Install or build the engine again; if that does not help, report it with this output."
        return Finding("post", f"logits, engine {case.engine}", file, expected, seen, cause, advice)
    known = expected_graphs.target(bundle.manifest) is not None
    if fault and known and text and even and measured.worst <= SENSITIVE * noise.row:
        return _outputs(case) or f"{text}: larger than for most models, but no fault found"
    if fault:
        cause = "weights, constants and graph match the checkpoint; probably both engines share a fault"
        return Finding("post", part, file, expected, seen, cause, REPORT)
    rows = min(len(case.expected.ids), MOST_ROWS)
    return _outputs(case) or f"{rows} rows of logits, {text}{graph_remark(case)}"


def _measured(case: Case, engine: str) -> tuple[Agreement, bool]:
    """The errors of the logits, and whether they are similar in all rows.

    Raises BadInput if the engine does not load the file, CheckFailed for values that are not finite.
    """
    expected, alone = case.expected, []
    post = Post(open_session(case.bundle.post_path, engine))
    for rows in spread(len(expected.ids)):
        logits = post(from_float32(expected.trace.outputs[-1][rows], case.dtype))
        alone.append(logit_errors(logits, expected.trace.logits[rows]))
    errors = Rows(*map(np.concatenate, zip(*alone, strict=True)))
    even = bool(errors.error.max() <= EVEN * np.median(errors.error))
    return Agreement.of("post", "logits", errors), even


def _runners(case: Case) -> Finding | None:
    """Compares the runner's logits of single rows with the post model run alone; they must be bit-identical."""
    session = open_session(case.bundle.post_path, case.engine)
    post, hidden = Post(session), from_float32(case.expected.trace.outputs[-1], case.dtype)
    for row in sorted({0, len(hidden) - 1}):
        found = _all_outputs(session, hidden[row : row + 1])
        alone = found["logits"][0, 0] if "logits" in found else to_float32(found["output"][0, 0], case.dtype)
        seen = post(hidden[row : row + 1])[0]
        if not np.array_equal(seen, alone, equal_nan=True):
            token = int(np.flatnonzero(seen != alone)[0])
            part, count = f"logits of row {row}, by the runner", int((seen != alone).sum())
            wanted = f"{alone[token]:.6g} for token {token}, as from the post model called directly"
            cause = f"the runner is at fault: {count} of {len(alone)} logits are not those of the post model"
            advice = "Install axrun again; if that does not help, report it with this output."
            return Finding("post", part, "board/axrun/model.py", wanted, f"{seen[token]:.6g}", cause, advice)
    return _block(post, hidden[:ROWS])


def _block(post: Post, hidden: Array) -> Finding | None:
    """Compares logits of a batch of rows with those of each row alone; only the summation order may differ."""
    together = post(hidden).copy()
    few = {0, 1, len(hidden) // 2, len(hidden) - 1}
    for row in range(len(hidden)) if together.shape[1] <= SMALL else sorted(few):
        alone = post(hidden[row : row + 1])
        error = float(logit_errors(together[row : row + 1], alone).error[0])
        if not error <= SUMS:
            part, expected = f"logits of row {row} of {len(hidden)}", f"those of the row run alone, error {SUMS:g}"
            cause = "the runner is at fault: logits of a batch of rows differ from those of each row"
            advice = "Install axrun again; if that does not help, report it with this output."
            return Finding("post", part, "board/axrun/model.py", expected, f"error {error:.2g}", cause, advice)
    return None


def spread(count: int) -> Iterator[NDArray[np.intp]]:
    """The rows to compare, spread over the walk, in small batches."""
    rows = np.unique(np.linspace(0, count - 1, min(count, MOST_ROWS)).astype(np.intp))
    for start in range(0, len(rows), ROWS):
        yield rows[start : start + ROWS]


def _other_agrees(case: Case) -> bool:
    try:
        measured, _ = _measured(case, case.other_engine)
    except (BadInput, CheckFailed):
        return False
    return not measured.fault(case.noise(case.bundle.flag("post_weight_type") or "s4"))


def _head(case: Case, tensors: dict[str, Stored]) -> list[Fault]:
    """Differences of the head from the reference's output matrix."""
    shape = (case.bundle.vocab_size, case.bundle.hidden_size)
    found = [entry for entry in tensors.values() if entry.shape == shape]
    if len(found) != 1:
        held = ", ".join(f"{entry.name} {list(entry.shape)}" for entry in tensors.values() if len(entry.shape) == 2)
        return [Fault(HEAD, "", "the head is missing or has another shape", f"{list(shape)}", held or "none")]
    entry, reference = found[0], case.reference

    def rows(name: str, start: int, stop: int) -> Floats:
        return reference.head(start, stop)

    recorded = next((case.calibrated[name] for name in (HEAD, EMBEDDING) if name in case.calibrated), None)
    if recorded is not None and entry.scaled:
        fault = weight_faults.unlike_calibrated(entry, HEAD, rows, recorded.error)
        return [] if fault is None else [fault]
    bad = weight_faults.compare(entry, HEAD, rows)
    if bad is None:
        return []

    def weight(name: str) -> Floats:
        return reference.head(0, None) if name == HEAD else reference.embedding(0, None)

    tied = np.array_equal(weight(HEAD)[bad[0] : bad[1]], weight(EMBEDDING)[bad[0] : bad[1]])
    others = {} if tied else {EMBEDDING: "the embedding table: the head is not tied in the checkpoint"}
    return [weight_faults.explain(entry, HEAD, *bad, weight, others, 0)]


def _outputs(case: Case) -> Finding | None:
    """Checks that `output` is `logits` in the hidden state's type, and `indices`, `prob` the top k of the softmax."""
    session = open_session(case.bundle.post_path, case.engine)
    named = {info.name for info in session.groups[0].outputs}
    hidden = from_float32(case.expected.trace.outputs[-1], case.dtype)
    for row in range(0, len(hidden), max(len(hidden) // 8, 1)):
        found = _all_outputs(session, hidden[row : row + 1])
        logits = to_float32(found["output"][0, 0], case.dtype)
        if "logits" in named:
            exact = found["logits"][0, 0]
            again = to_float32(from_float32(exact, case.dtype), case.dtype)
            if not np.array_equal(again, logits):
                at = int(np.flatnonzero(again != logits)[0])
                return _other(
                    case, "output", f"{again[at]:.6g} for token {at}", f"{logits[at]:.6g}", "the rounded logits"
                )
            logits = exact
        if {"indices", "prob"} <= named:
            finding = _top_k(case, found, logits.astype(np.float64))
            if finding is not None:
                return finding
    return None


def _all_outputs(session: Session, hidden: Array) -> dict[str, Array]:
    group = session.groups[0]
    arrays = {info.name: session.allocate(info) for info in (*group.inputs, *group.outputs)}
    arrays["input"][0, :1] = hidden
    session.bind(0, arrays).run()
    return arrays


def _top_k(case: Case, found: dict[str, Array], logits: Array) -> Finding | None:
    ids = found["indices"].reshape(-1).astype(np.int64)
    seen = to_float32(found["prob"].reshape(-1), case.dtype)
    share = np.exp(logits - logits.max())
    share /= share.sum()
    if (ids < 0).any() or (ids >= len(share)).any() or len(set(ids.tolist())) != len(ids):
        return _other(
            case, "indices", f"{len(ids)} tokens, each once", f"{ids[:6].tolist()}", "the k most likely tokens"
        )
    best = np.sort(share)[::-1][: len(ids)]
    if (np.abs(share[ids] - best) > TIE + 1e-3 * best).any():
        right = np.argsort(-share, kind="stable")[: len(ids)]
        return _other(case, "indices", f"{right[:6].tolist()}", f"{ids[:6].tolist()}", "the k most likely tokens")
    rounding = {"BFLOAT16": 2.0**-7, "FLOAT16": 2.0**-9}.get(case.dtype, 1e-4)
    if (np.abs(seen - best) > rounding * best + 1e-6).any():
        shown = [f"{value:.4g}" for value in best[:3]], [f"{value:.4g}" for value in seen[:3]]
        return _other(case, "prob", ", ".join(shown[0]), ", ".join(shown[1]), "their softmax")
    return None


def _other(case: Case, output: str, expected: str, seen: str, what: str) -> Finding:
    cause = (
        f"{output} differs from {what}: the graph of the post model was changed, or engine {case.engine} is at fault"
    )
    return Finding("post", output, case.bundle.post_file, expected, seen, cause, REBUILD)

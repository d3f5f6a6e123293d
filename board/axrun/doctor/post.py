"""The stages `post` and `answer`: logits of reference hidden states, and the greedy answer of the whole model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from axrun import memory
from axrun.agreement import GAP, centred, cosines, logit_errors
from axrun.doctor.constants import constants
from axrun.doctor.context import Context
from axrun.doctor.figures import unpacked
from axrun.doctor.report import Finding
from axrun.doctor.row_errors import allowed_post, allowed_whole
from axrun.doctor.stages import NotExamined, refused
from axrun.errors import Failure
from axrun.generate import Token, forced, steps
from axrun.load import Loading
from axrun.model import Model, Post
from axrun.sequence import Sequence
from axrun.session import open_session

Floats = NDArray[np.float32]

POST, ANSWER = "post", "answer"
FEW = 0.01  # maximum share of the vocabulary to report single logits


def post(context: Context) -> str | Finding:
    """Compares logits of a few hidden states over the whole vocabulary."""
    context.expect_runnable()
    bundle, figures = context.bundle, context.figures
    noise = allowed_post(bundle, figures)
    file = bundle.post_file
    if found := constants(context, POST, None):
        return found
    try:
        model = Post(open_session(bundle.post_path, context.engine, context.threads))
        ours = model(figures.post_hidden).copy()
    except Failure as failure:
        return refused(POST, failure, "the post model", file)
    reference = unpacked(figures.post_logits, figures.post_logits_scale)
    errors = logit_errors(ours, reference)
    worst = int(errors.error.argmax())
    most = float(errors.error[worst])
    if most <= noise.row and not (few := _few(ours, reference)):
        return f"{len(ours)} rows of {bundle.vocab_size:,} logits; largest error {most:.2g}, allowed {noise.row:.2g}"
    if most <= noise.row:
        part = f"logit of token {few[0]}" + f" and {len(few) - 1} more" * (len(few) > 1)
        wanted, seen = f"{reference[0, few[0]]:.4g}", f"{ours[0, few[0]]:.4g}"
        cause = "rows of the head are damaged, or have the scale of another row"
        return _finding(POST, part, file, wanted, seen, cause)
    cause = _cause(ours, reference, noise.row)
    tops = [f"token {int(row.argmax())} most likely" for row in (reference[worst], ours[worst])]
    seen = f"{tops[1]}, error {errors.error[worst]:.2g}, cosine {errors.cosine[worst]:.4f}"
    return _finding(POST, f"logits, row {worst}", file, f"{tops[0]}, error at most {noise.row:.2g}", seen, cause)


def _few(ours: Floats, reference: Floats) -> list[int]:
    """Tokens whose logits have far larger errors than the others in every row."""
    apart = np.abs(centred(ours) - centred(reference))
    usual = np.sqrt((apart**2).mean(axis=1, keepdims=True))
    found = np.flatnonzero((apart > 16 * usual + 1e-6).all(axis=0))
    return [int(token) for token in found] if len(found) <= max(1, FEW * ours.shape[1]) else []


def _cause(ours: Floats, reference: Floats, most: float) -> str:
    if not np.isfinite(ours).all():
        return "values are not finite: an overflow, or damaged weights"
    for shift in (1, -1, 2, -2):
        if (logit_errors(np.roll(ours, -shift, axis=1), reference).error <= most).all():
            return f"the rows of the head are shifted by {shift:+d}"
    if (cosines(centred(ours), centred(reference)) > 0.999).all():
        ratio = float((centred(ours) * centred(reference)).sum() / (centred(reference) ** 2).sum())
        return f"logits are scaled by {ratio:.3g}: a scale or a soft cap is missing, or applied twice"
    few = _few(ours, reference)
    if few:
        return f"{len(few)} logits are far off, token {few[0]} first: rows of the head are damaged"
    return "the head or final norm of another model, or a norm whose weight or epsilon differs from the checkpoint"


def answer(context: Context) -> str | Finding:
    """Compares the whole model's prediction after each token of the reference's greedy answer."""
    context.expect_runnable()
    bundle, figures = context.bundle, context.figures
    asked, tokens = figures.asked.tolist(), figures.answer.tolist()
    if not asked or not tokens:
        raise NotExamined("the figures have no answer")
    shortage = memory.shortage(bundle, context.engine)
    if shortage is not None:
        raise NotExamined(shortage.text())
    loading = Loading(engine=context.engine, threads=context.threads, progress=lambda part: context.say(f"  {part}"))
    try:
        model = loading.load(bundle)
        rows = np.stack(list(_forced(model, asked, tokens)))
    except Failure as failure:
        return refused(ANSWER, failure, "the whole model", "")
    ids = figures.answer_ids.astype(np.int64)
    reference, noise = figures.answer_logits, allowed_whole(bundle, figures)
    errors = logit_errors(rows[:, ids], reference)
    rms = float(np.sqrt((errors.error**2).mean()))
    apart = centred(rows[:, ids]) - centred(reference)
    gap = GAP * float(np.sqrt((apart**2).mean()))
    if not rms <= noise.logits:
        seen = f"an error of {rms:.2g}, cosine {float(errors.cosine.min()):.4f}"
        return _finding(
            ANSWER,
            "the logits of the answer",
            "",
            f"an error of at most {noise.logits:.2g}",
            seen,
            "each layer alone is right: the runner combines them wrongly, or errors accumulate",
        )
    places = {int(token): place for place, token in enumerate(ids)}
    same = 0
    for at, (row, theirs) in enumerate(zip(rows, tokens)):
        mine = int(row.argmax())
        same += mine == theirs
        place = places.get(mine)
        least = float(np.sort(reference[at])[0]) if place is None else float(reference[at, place])
        margin = float(reference[at, places[theirs]]) - least if theirs in places else 0.0
        if mine != theirs and not margin <= gap:
            part = f"token {at + 1} of the answer"
            cause = f"the reference's token leads by {margin:.2g} in logits; the measured errors explain {gap:.2g}"
            return _finding(ANSWER, part, "", f"token {theirs}", f"token {mine}", cause)
    return f"{same} of {len(tokens)} greedy tokens agree (teacher-forced); error of the logits {rms:.2g}"


def _forced(model: Model, asked: list[int], tokens: list[int]) -> Iterator[Floats]:
    """Logits after the prompt, and after each token of the reference's answer except the last."""
    for step in steps(Sequence(model), asked, forced(tokens), len(tokens)):
        if isinstance(step, Token):
            yield step.logits.copy()


def _finding(stage: str, part: str, file: str, expected: str, seen: str, cause: str) -> Finding:
    advice = "Build the bundle again; if the error persists, report it with this output."
    return Finding(stage, part, file, expected, seen, cause, advice)

"""Stage `answer`: compares the whole model's logits over the walk, and its greedy tokens, with the reference."""

from __future__ import annotations

import numpy as np

from axc.check import compared, is_bfloat16
from axc.doctor.case import REPORT, Case
from axc.doctor.layers import SENSITIVE
from axc.doctor.post import spread
from axc.doctor.whole import examine_whole
from axrun.agreement import GAP, Agreement, Rows, centred, divergence, explained, logit_errors
from axrun.doctor.report import Finding
from axrun.doctor.stages import NotExamined
from axrun.format.dtypes import from_float32
from axrun.model import Post
from axrun.session import open_session

CAUSE = "every part alone agrees, so errors accumulate: probably the weight type is too coarse for this model"
FINER = "Build with finer weights (-w s8 or bf16); if that does not help, report it with this output."


def examine(case: Case) -> str | Finding:
    """Uses the hidden states computed by the stage `cache`."""
    bundle, expected = case.bundle, case.expected
    if bundle.maker != "cpu":
        raise NotExamined("needs a board with an NPU: run `axrun doctor` there")
    walked, spoken = case.examined["walk"], case.examined["spoken"]
    finding = examine_whole(case, spoken)
    if finding is not None:
        return finding
    post = Post(open_session(bundle.post_path, case.engine))
    errors, divergences, spreads = [], [], []
    for rows in spread(len(expected.ids)):
        logits, wanted = post(from_float32(walked[rows], case.dtype)), expected.trace.logits[rows]
        errors.append(logit_errors(logits, wanted))
        divergences.append(divergence(wanted, logits))
        spreads.append((centred(logits) - centred(wanted)).std(axis=1))
    kld = float(np.concatenate(divergences).mean())
    deviation = float(np.sqrt((np.concatenate(spreads) ** 2).mean()))
    measured = Agreement.of("model", "logits", Rows(*map(np.concatenate, zip(*errors, strict=True))))
    types = {bundle.hidden_state_type, *([] if is_bfloat16(expected.trace.embedded) else ["bf16"])}
    types |= {bundle.flag(name) or "s4" for name in ("weight_type", "post_weight_type")} - expected.exact
    noise = explained(*sorted(types))
    most, limit = SENSITIVE * noise.kld, SENSITIVE * noise.logits
    if not kld <= most or not measured.rms <= limit:
        return Finding(
            "answer",
            "logits of the whole model",
            "",
            f"mean KL divergence at most {most:.2e}, error of logits at most {limit:.2e}",
            f"{kld:.2e} and {measured.rms:.2e}",
            CAUSE,
            FINER,
        )
    if expected.answer is None:
        return f"mean KL divergence {kld:.1e}; no tokenizer, so no answer"
    said = post(from_float32(spoken.hidden[len(expected.answer.asked) - 1 :], case.dtype))
    chosen, wrong = compared(expected.answer, said, GAP * deviation)
    if wrong:
        at = next(i for i, (a, b) in enumerate(zip(chosen, expected.answer.tokens, strict=True)) if a != b)
        gap = float(expected.answer.logits[at, expected.answer.tokens[at]] - expected.answer.logits[at, chosen[at]])
        return Finding(
            "answer",
            f"token {at + 1} after {case.options.prompt!r:.40}",
            "",
            f"token {expected.answer.tokens[at]}, which leads by {gap:.3g} in logits",
            f"token {chosen[at]}; the measured errors explain at most {GAP * deviation:.3g}",
            CAUSE,
            REPORT,
        )
    same = sum(a == b for a, b in zip(chosen, expected.answer.tokens, strict=True))
    text = case.tokenizer.decode(chosen) if case.tokenizer else ""
    more = f", above the {noise.kld:.1e} expected of the types" if kld > noise.kld else ""
    return f"{same} of {len(chosen)} tokens match the reference: {text!r:.40}; mean KL divergence {kld:.1e}{more}"

"""Compares the whole model as `axrun run` runs it, all layers in one decoder, with its layers run one after another.

Both run the same axmodels on the same shapes. K, V, logits and tokens must be bit-identical; otherwise the runner
connects the layers wrongly.
"""

from __future__ import annotations

import numpy as np

from axc.doctor.cache import DECODER, INSTALL, Spoken
from axc.doctor.case import Case
from axc.doctor.stored import Floats
from axrun import memory
from axrun.doctor.report import Finding
from axrun.errors import Failure
from axrun.format.dtypes import from_float32, to_float32
from axrun.generate import Token, forced, generate, steps
from axrun.model import Model, Post
from axrun.sampling import Sampling
from axrun.sequence import Sequence

GENERATED = 4  # tokens to generate with the runner's decoding loop
MODEL, GENERATE = "board/axrun/model.py", "board/axrun/generate.py"


def examine_whole(case: Case, spoken: Spoken) -> Finding | None:
    """None if it agrees, or if there is not enough memory to load the model."""
    bundle = case.bundle
    shortage = memory.shortage(bundle, case.engine)
    if shortage is not None:
        case.say(f"  the layers are not run as one model: {shortage.text()}")
        return None
    case.say("  the whole model, as `axrun run` runs it")
    try:
        model = Model.load(bundle, case.engine)
        logits = _forced(model, spoken)
    except Failure as failed:
        seen = str(failed).partition("\n")[0]
        return _finding("the whole model", MODEL, "logits", seen, "layers and post model run when called alone")
    if (finding := _cached(case, model, spoken)) is not None:
        return finding
    post = Post(model.post.session)
    for at, row in enumerate(logits):
        last = spoken.hidden[spoken.asked - 1 + at : spoken.asked + at]
        alone = post(from_float32(last, case.dtype))[0]
        if not np.array_equal(row, alone):
            token = int(np.flatnonzero(row != alone)[0])
            part = f"logits after {spoken.asked + at} tokens"
            seen = f"{row[token]:.6g} for token {token}"
            cause = "K and V are right: it passes wrong hidden states between layers or to the post model"
            return _finding(part, MODEL, f"{alone[token]:.6g}, as from layers run one by one", seen, cause)
    return _generated(case, model, spoken, logits)


def _forced(model: Model, spoken: Spoken) -> list[Floats]:
    """Logits after the prompt, and after each further token."""
    prompt, tokens = spoken.ids[: spoken.asked], spoken.ids[spoken.asked :]
    going = steps(Sequence(model), prompt, forced(tokens), len(tokens) + 1)
    return [step.logits.copy() for step in going if isinstance(step, Token)]


def _cached(case: Case, model: Model, spoken: Spoken) -> Finding | None:
    """Compares K and V of the whole model with those of each layer run alone."""
    caches = (model.decoder.cache.keys, model.decoder.cache.values)
    for layer, pair in enumerate(spoken.rows):
        for name, cache, wanted in zip("KV", caches, pair, strict=True):
            rows = to_float32(cache[layer][0, : len(spoken.ids)], case.dtype)
            bad = np.flatnonzero((rows != wanted).any(axis=1))
            if len(bad):
                part = f"layer {layer}, row {bad[0]} of {name}, all layers in one decoder"
                seen = f"a different row; {len(bad)} of {len(wanted)} rows differ"
                cause = _holds(spoken, rows[bad[0]])
                return _finding(part, DECODER, "the row of the layer run in a decoder of its own", seen, cause)
    return None


def _holds(spoken: Spoken, seen: Floats) -> str:
    """Explains a wrong row: which row of which layer it holds."""
    if not seen.any():
        return "the row was not written, or was cleared"
    for layer, pair in enumerate(spoken.rows):
        for name, rows in zip("KV", pair, strict=True):
            found = np.flatnonzero((rows == seen).all(axis=1))
            if len(found):
                return f"it holds {name} of layer {layer}, row {found[0]}: rows are written to another layer's cache"
    return "a layer does not get the output of the previous one, or layers share cache rows"


def _generated(case: Case, model: Model, spoken: Spoken, logits: list[Floats]) -> Finding | None:
    """Checks the runner's decoding loop, up to its first token that differs from the forced ones."""
    asked = spoken.ids[: spoken.asked]
    wanted = spoken.ids[spoken.asked :]
    for at, token in enumerate(generate(Sequence(model), asked, Sampling(), min(GENERATED, len(logits)))):
        best = int(logits[at].argmax())
        if token.id != best:
            part = f"token {at + 1} of an answer"
            return _finding(part, GENERATE, f"token {best}, the most likely", f"token {token.id}", "its decoding loop")
        if at >= len(wanted) or best != wanted[at]:
            break
    return None


def _finding(part: str, file: str, expected: str, seen: str, cause: str) -> Finding:
    cause = f"each layer alone agrees, so the runner is at fault: {cause}"
    return Finding("answer", part, file, expected, seen, cause, INSTALL)


__all__ = ["examine_whole"]

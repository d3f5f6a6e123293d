"""Checks of a bundle. The yardstick is the float32 reference of the checkpoint, never our own quantised copy.

Level 0 loads and runs every axmodel. Level 1 also compares every layer, in prefill and decode, and the post model with
the reference. Level 2 also generates from a prompt, beside the reference, and compares the logits of whole models.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from board.bundle import Bundle
from board.chat import ChatTemplate, prompt_ids
from board.decoder import Decoder
from board.dtypes import FLOATS, from_float32
from board.errors import CheckFailed
from board.generate import generate
from board.model import Model, Post
from board.sampling import Sampling
from board.session import open_session
from board.tokenizer import Tokenizer

if TYPE_CHECKING:
    from toolchain.build import Plan
    from toolchain.reference import Reference

Floats = NDArray[np.float32]
Say = Callable[[str], None]

ENGINE = "ort"  # not our own: what one hand wrote twice, compiler and engine, may be wrong twice alike
LEVELS = ("load and run", "layers against the float32 reference", "whole model against the float32 reference")
ANSWER_TOKENS = 32  # of a level 2 generation
DECODED = 2  # tokens of a level 1 sequence that go through the decode group
# The least cosine of a layer's output rows, and the most mean KL divergence of a model, by weight type: a flipped scale
# or a lost bias is far outside, the rounding of the type well inside.
LEAST_COSINE = {"fp32": 0.999, "fp16": 0.999, "bf16": 0.999, "s8": 0.998, "s4": 0.9}
MOST_DIVERGENCE = {"fp32": 0.005, "fp16": 0.005, "bf16": 0.005, "s8": 0.02, "s4": 0.5}


@dataclass(frozen=True)
class Agreement:
    """How rows agree with the reference's: the least cosine of a row, the largest error over the largest value."""

    part: str
    stage: str
    cosine: float
    worst_error: float

    def text(self) -> str:
        return f"{self.part:<9} {self.stage:<8} cosine {self.cosine:.6f}  worst error {self.worst_error:.2e}"


def agreement(part: str, stage: str, ours: Floats, reference: Floats) -> Agreement:
    """Compares rows [n, width]."""
    a, b = ours.astype(np.float64), reference.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = float(((a * b).sum(axis=1) / np.maximum(norms, 1e-300)).min())
    return Agreement(part, stage, cosine, float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-300)))


def check(plan: Plan, level: int, prompt: str, say: Say, report: Path | None = None) -> None:
    """Runs a level and those below it. Raises CheckFailed naming the first part that disagrees.

    `report` receives the figures as JSON; they vary in the last digits with the CPU, so they are no part of the bundle.
    """
    bundle = Bundle.open(plan.options.output_path)
    results: dict[str, Any] = {"level": level, "prompt": prompt}
    say(f"check 0: {LEVELS[0]}")
    _load_and_run(bundle)
    say(f"  {bundle.layers} layers and post run, {len(bundle.groups)} groups")
    failures: list[str] = []
    if level >= 1:
        from toolchain.reference import Reference

        reference = Reference(plan.checkpoint, plan.config, plan.options.model_config)
        ids = sample_ids(bundle, prompt)
        say(f"check 1: {LEVELS[1]}, {len(ids)} tokens")
        agreements, logits = _layers(bundle, reference, ids, say)
        results["layers"] = [asdict(entry) for entry in agreements]
        failures += _disagreements(plan, agreements)
    if level >= 2:
        say(f"check 2: {LEVELS[2]}")
        results["model"], text = _whole(bundle, reference, ids, logits, prompt)
        say(text)
        most = max(MOST_DIVERGENCE[name] for name in (plan.target.weight_type, plan.target.post_weight_type))
        divergence = results["model"]["mean_kld"]
        if not divergence <= most:
            failures.append(f"mean KL divergence from the reference is {divergence:.4g}, expected at most {most}")
    if report is not None:
        report.write_text(json.dumps({**results, "failures": failures}, indent=2) + "\n", "utf-8")
    if failures:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise CheckFailed(f"{bundle.path} does not agree with its checkpoint: {failures[0]}{more}\nDo not ship it.")


def _load_and_run(bundle: Bundle) -> None:
    """Every axmodel once in every group, on zeros. Raises CheckFailed for an output that is not finite."""
    for index in range(bundle.layers):
        decoder = Decoder([open_session(bundle.layer_path(index), ENGINE)])
        for group in sorted(bundle.groups, key=lambda group: group.history):
            rows = np.zeros((min(group.tokens, bundle.kv_cache_len), bundle.hidden_size), np.float32)
            start = min(decoder.cache.length, bundle.kv_cache_len - len(rows))
            if not np.isfinite(decoder.forward(rows, start)).all():
                raise CheckFailed(f"layer {index} gives values that are not finite in group {group.index}")
    hidden = from_float32(np.zeros((1, bundle.hidden_size), np.float32), FLOATS[bundle.hidden_state_type])
    logits = Post(open_session(bundle.post_path, ENGINE))(hidden)
    if not np.isfinite(logits).all():
        raise CheckFailed("the post model gives logits that are not finite")


def sample_ids(bundle: Bundle, prompt: str) -> NDArray[np.int64]:
    """Token ids that go through the first prefill group, the next one where there is one, and decode.

    The prompt over and over; where the checkpoint has no tokenizer, ids spread over the vocabulary.
    """
    prefill = bundle.prefill_len * min(len(bundle.groups) - 1, 2)
    count = min(max(prefill, 1) + DECODED, bundle.kv_cache_len)
    tokenizer = Tokenizer.find(bundle.hf)
    ids = tokenizer.encode(prompt) if tokenizer else []
    if not ids:
        ids = [(7919 * i) % bundle.vocab_size for i in range(count)]
    return np.resize(np.array(ids, np.int64), count)


def _layers(bundle: Bundle, reference: Reference, ids: NDArray[np.int64], say: Say) -> tuple[list[Agreement], Floats]:
    """Each layer of ours fed with the reference's hidden states; also the reference's logits [n, vocab]."""
    found = []
    prefilled = len(ids) - DECODED if bundle.prefill_len else 0
    for index, given, expected in reference.layers(ids):
        decoder = Decoder([open_session(bundle.layer_path(index), ENGINE)])
        for stage, rows in _stages(prefilled, len(ids)):
            ours = np.concatenate([decoder.forward(given[part], part.start) for part in rows])
            span = slice(rows[0].start, rows[-1].stop)
            found.append(agreement(f"layer {index}", stage, ours, expected[span]))
            say("  " + found[-1].text())
    logits = reference.logits(expected)
    ours = Post(open_session(bundle.post_path, ENGINE))(from_float32(expected, FLOATS[bundle.hidden_state_type]))
    found.append(agreement("post", "logits", ours, logits))
    say("  " + found[-1].text())
    return found, logits


def _stages(prefilled: int, count: int) -> Iterator[tuple[str, list[slice]]]:
    """What goes through prefill at once, and what through decode token by token."""
    if prefilled:
        yield "prefill", [slice(0, prefilled)]
    yield "decode", [slice(i, i + 1) for i in range(prefilled, count)]


def _disagreements(plan: Plan, agreements: list[Agreement]) -> list[str]:
    faults = []
    for entry in agreements:
        least = LEAST_COSINE[plan.target.post_weight_type if entry.part == "post" else plan.target.weight_type]
        if not entry.cosine >= least:
            faults.append(f"{entry.part} in {entry.stage} has cosine {entry.cosine:.6f}, expected at least {least}")
    return faults


def divergence(reference: Floats, ours: Floats) -> NDArray[np.float64]:
    """KL(reference || ours) in nats for rows of logits [n, vocab]: [n]."""
    p, q = _log_softmax(reference), _log_softmax(ours)
    return np.asarray((np.exp(p) * (p - q)).sum(axis=1))


def _log_softmax(logits: Floats) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _whole(
    bundle: Bundle, reference: Reference, ids: NDArray[np.int64], expected: Floats, prompt: str
) -> tuple[dict[str, Any], str]:
    model = Model.load(bundle, ENGINE)
    logits = model.forward(ids.tolist(), 0, logits="all")
    found: dict[str, Any] = {
        "mean_kld": float(divergence(expected, logits).mean()),
        "top1_agreement": float((expected.argmax(axis=1) == logits.argmax(axis=1)).mean()),
    }
    text = f"  mean KL divergence {found['mean_kld']:.2e}, top-1 agreement {found['top1_agreement']:.1%}"
    tokenizer = Tokenizer.find(bundle.hf)
    if tokenizer is None:
        return found, text + "\n  no tokenizer in the checkpoint: nothing generated"
    asked = prompt_ids(tokenizer, ChatTemplate.find(bundle.hf), prompt)
    stop = tokenizer.stop_ids
    model.decoder.cache.reset()
    room = min(ANSWER_TOKENS, bundle.kv_cache_len - len(asked))
    ours = [token.id for token in generate(model, asked, Sampling(), room, stop)]
    theirs = reference.generate(np.array(asked, np.int64), room, stop)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False)))
    found |= {"answer": tokenizer.decode(ours), "reference": tokenizer.decode(theirs), "same_tokens": same}
    return found, (
        f"{text}\n  prompt     {prompt}\n  compiled   {found['answer']}\n  reference  {found['reference']}\n"
        f"  the first {same} of {len(theirs)} tokens are the same"
    )

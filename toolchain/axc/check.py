"""Checks a bundle against its checkpoint as loaded and computed by transformers, never against our own quantised copy.

Level 0 loads and runs every axmodel. Level 1 compares every layer and the post model over a walk through the shape
groups; each layer gets the reference's hidden states. Level 2 compares the whole model over that walk, the token ids of
the prompt, and a greedy answer. At most one layer of the bundle is in memory at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from axc import walk
from axc.expected import Answer, Expected, expect
from axc.walk import Step
from axrun.agreement import (
    GAP,
    Agreement,
    Rows,
    centred,
    divergence,
    explained,
    logit_errors,
    rises,
    update_errors,
)
from axrun.decoder import Decoder
from axrun.errors import CheckFailed
from axrun.format.bundle import Bundle
from axrun.format.dtypes import FLOATS, from_float32, to_float32
from axrun.model import Embedding, Post
from axrun.session import open_session
from axrun.text.template import ChatTemplate, prompt_ids
from axrun.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from axc.build import Plan

Floats = NDArray[np.float32]
Say = Callable[[str], None]

ENGINE = "ort"  # not our own: a bug shared by compiler and engine would go unseen
LEVELS = ("load and run", "layers against the float32 reference", "whole model against the float32 reference")
LOGIT_ROWS = 64  # compared at a time


@dataclass
class Found:
    """The bundle's hidden states [n, hidden] of walk and answer, after the last layer run so far."""

    walk: Floats
    answer: Floats
    agreements: list[Agreement] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def check(plan: Plan, level: int, prompt: str, say: Say, report: Path | None = None) -> None:
    """Runs a level and all lower ones. Raises CheckFailed naming the first part that disagrees.

    `report` gets the figures as JSON. They are not part of the bundle, because their last digits depend on the CPU.
    """
    bundle = Bundle.open(plan.options.output_path)
    results: dict[str, Any] = {"level": level, "prompt": prompt}
    say(f"check 0: {LEVELS[0]}")
    _load_and_run(bundle)
    say(f"  {bundle.layers} layers and post run, {len(bundle.groups)} group{'s' if len(bundle.groups) > 1 else ''}")
    faults: list[str] = []
    if level >= 1:
        asked = _asked(bundle, prompt) if level >= 2 else []
        expected = expect(plan.options, bundle, prompt, asked, say)
        say(f"check 1: {LEVELS[1]}, {expected.reach}")
        found = _layers(plan, bundle, expected, say)
        whole = _post(plan, bundle, expected, found, say)
        results |= {"reach": expected.reach, "layers": [asdict(entry) for entry in found.agreements]}
        faults += found.faults
        if level >= 2:
            say(f"check 2: {LEVELS[2]}")
            faults += _other_prompt(bundle, plan.options.input_path, prompt)
            results["model"] = _whole(plan, bundle, expected, whole, prompt, say, faults)
    if report is not None:
        report.write_text(json.dumps(_as_json({**results, "failures": faults}), indent=2) + "\n", "utf-8")
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise CheckFailed(f"{bundle.path} does not agree with its checkpoint: {faults[0]}{more}\nDo not ship it.")


def _load_and_run(bundle: Bundle) -> None:
    """Runs every axmodel in every group on zeros. Raises CheckFailed for a non-finite output."""
    for index in range(bundle.layers):
        decoder = Decoder([open_session(bundle.layer_path(index), ENGINE)])
        for group in sorted(bundle.groups, key=lambda group: group.history):
            rows = np.zeros((min(group.tokens, bundle.kv_cache_len), bundle.hidden_size), np.float32)
            start = min(decoder.cache.length, bundle.kv_cache_len - len(rows))
            values = [decoder.forward(rows, start)]
            values += [to_float32(kept, decoder.dtype) for kept in (*decoder.cache.keys, *decoder.cache.values)]
            if not all(np.isfinite(each).all() for each in values):
                raise CheckFailed(f"layer {index} gives values that are not finite in group {group.index}")
    hidden = from_float32(np.zeros((1, bundle.hidden_size), np.float32), FLOATS[bundle.hidden_state_type])
    logits = Post(open_session(bundle.post_path, ENGINE))(hidden)
    if not np.isfinite(logits).all():
        raise CheckFailed("the post model gives logits that are not finite")


def _asked(bundle: Bundle, prompt: str) -> list[int]:
    """The token ids of the prompt as the runner encodes it; empty without a tokenizer."""
    tokenizer = Tokenizer.find(bundle.hf)
    return prompt_ids(tokenizer, ChatTemplate.find(bundle.hf), prompt) if tokenizer else []


def _layers(plan: Plan, bundle: Bundle, expected: Expected, say: Say) -> Found:
    """Runs each layer on the reference's hidden states, and all layers in sequence."""
    dtype = FLOATS[bundle.hidden_state_type]
    noise = explained(bundle.hidden_state_type, *_rounding(plan.target.weight_type, expected))
    steps = list(walk.steps(bundle.prefill_len, len(expected.ids)))
    answer = expected.answer
    ids = answer.asked + answer.tokens[:-1] if answer else []
    turns = [Step("prefill", 0, len(answer.asked))] if answer else []
    turns += [Step("decode", at, at + 1) for at in range(turns[0].stop if turns else 0, len(ids))]
    embedding = Embedding(bundle.embedding_path, bundle.vocab_size, bundle.hidden_size, dtype)
    found = Found(to_float32(embedding(expected.ids.tolist()), dtype), to_float32(embedding(ids), dtype))
    _embedding(plan, expected, found)
    for index in range(bundle.layers):
        decoder = Decoder([open_session(bundle.layer_path(index), ENGINE)])
        entries = list(_layer(decoder, index, steps, expected, bundle.hidden_state_type))
        found.agreements += entries
        found.faults += [fault for entry in entries if (fault := entry.fault(noise))]
        say("  " + _line(entries))
        found.walk = through(decoder, steps, found.walk)
        found.answer = through(decoder, turns, found.answer)
    found.faults += rises(found.agreements)
    return found


def _embedding(plan: Plan, expected: Expected, found: Found) -> None:
    """Checks that the table has the reference's rows, rounded to bfloat16 and to the hidden state's type."""
    rows, table = found.walk, expected.trace.embedded
    error = np.abs(rows.astype(np.float64) - table)
    least = 2.0**-8 + {"fp16": 2.0**-11}.get(plan.target.hidden_state_type, 0.0)
    if not (error <= least * np.abs(table) + 2.0**-25).all():
        found.faults.append(
            f"the embedding table differs from the checkpoint's by {error.max():.2e}, more than rounding"
        )


def _layer(
    decoder: Decoder, index: int, steps: Sequence[Step], expected: Expected, hidden_type: str
) -> Iterator[Agreement]:
    """Compares one layer in every stage."""
    given, wanted = expected.trace.inputs[index], expected.trace.outputs[index]
    stages: dict[str, list[Rows]] = {}
    for step in steps:
        part = slice(step.start, step.stop)
        out = decoder.forward(given[part], step.start)
        stages.setdefault(step.stage, []).append(update_errors(out, wanted[part], given[part], hidden_type))
    for probe in expected.probes:
        start = probe.step.start
        _remember(decoder, *probe.history[index])
        rows, given = probe.trace.inputs[index], probe.trace.outputs[index]
        pieces = [slice(i, i + 1) for i in range(len(rows))] if probe.step.stage == "end" else [slice(0, len(rows))]
        out = np.concatenate([decoder.forward(rows[part], start + part.start) for part in pieces])
        stages.setdefault(probe.step.stage, []).append(update_errors(out, given, rows, hidden_type))
    for stage, found in stages.items():
        yield Agreement.of(f"layer {index}", stage, Rows(*map(np.concatenate, zip(*found, strict=True))))


def _remember(decoder: Decoder, keys: Floats, values: Floats) -> None:
    """Fills the cache of a single layer with exactly these rows [n, kv_size]."""
    decoder.cache.reset()
    decoder.cache.write(0, 0, *(from_float32(rows[None], decoder.dtype) for rows in (keys, values)))
    decoder.cache.length = len(keys)


def through(decoder: Decoder, steps: Sequence[Step], hidden: Floats) -> Floats:
    """The outputs [n, hidden] of a layer for a sequence from the beginning, after all steps."""
    decoder.cache.reset()
    out = np.empty_like(hidden)
    for step in steps:
        out[step.start : step.stop] = decoder.forward(hidden[step.start : step.stop], step.start)
    return out


def _post(plan: Plan, bundle: Bundle, expected: Expected, found: Found, say: Say) -> dict[str, Any]:
    """Runs the post model on the reference's hidden states and on the bundle's own, LOGIT_ROWS rows at a time."""
    dtype = FLOATS[bundle.hidden_state_type]
    post = Post(open_session(bundle.post_path, ENGINE))
    alone, whole, divergences, spreads, same = [], [], [], [], []
    for start in range(0, len(expected.ids), LOGIT_ROWS):
        rows = slice(start, start + LOGIT_ROWS)
        wanted = expected.trace.logits[rows]
        alone.append(logit_errors(post(from_float32(expected.trace.outputs[-1][rows], dtype)), wanted))
        logits = post(from_float32(found.walk[rows], dtype))
        whole.append(logit_errors(logits, wanted))
        divergences.append(divergence(wanted, logits))
        spreads.append((centred(logits) - centred(wanted)).std(axis=1))
        same.append(logits.argmax(axis=1) == wanted.argmax(axis=1))
    entry = Agreement.of("post", "logits", Rows(*map(np.concatenate, zip(*alone, strict=True))))
    noise = explained(bundle.hidden_state_type, *_rounding(plan.target.post_weight_type, expected))
    found.agreements.append(entry)
    found.faults += [fault] if (fault := entry.fault(noise)) else []
    say("  " + _line([entry]))
    answer = expected.answer
    said = post(from_float32(found.answer[len(answer.asked) - 1 :], dtype)) if answer else None
    return {
        "errors": Agreement.of("model", "logits", Rows(*map(np.concatenate, zip(*whole, strict=True)))),
        "kld": np.concatenate(divergences),
        "logit_error": float(np.sqrt((np.concatenate(spreads) ** 2).mean())),
        "same": np.concatenate(same),
        "answer": said,
    }


def _whole(
    plan: Plan, bundle: Bundle, expected: Expected, whole: dict[str, Any], prompt: str, say: Say, faults: list[str]
) -> dict[str, Any]:
    """Figures of the whole model; values beyond their bounds are appended to `faults`."""
    target, rounded = plan.target, expected.trace.embedded
    types = {bundle.hidden_state_type, *_rounding(target.weight_type, expected)}
    types |= {*_rounding(target.post_weight_type, expected), *([] if is_bfloat16(rounded) else ["bf16"])}
    noise = explained(*sorted(types))
    errors, kld = whole["errors"], float(whole["kld"].mean())
    results: dict[str, Any] = {
        "mean_kld": kld,
        "most_kld": noise.kld,
        "top1_agreement": float(whole["same"].mean()),
        "logits": asdict(errors),
        "logit_error": whole["logit_error"],
    }
    over = "over arbitrary tokens, harder than text; axrun eval measures text"
    say(f"  mean KL divergence {kld:.2e}, top-1 agreement {results['top1_agreement']:.1%} ({over})")
    if not kld <= noise.kld:
        faults.append(f"mean KL divergence from the reference is {kld:.2e}, expected at most {noise.kld:.2e}")
    if not errors.rms <= noise.logits:
        faults.append(f"the logits have error {errors.rms:.2e}, expected at most {noise.logits:.2e}")
    tokenizer = Tokenizer.find(bundle.hf)
    if expected.answer is None or tokenizer is None:
        say("  no tokenizer in the checkpoint: no answer" if tokenizer is None else "  an empty prompt: no answer")
        return results
    answer, stop = expected.answer, tokenizer.stop_ids
    chosen, wrong = compared(answer, whole["answer"], GAP * whole["logit_error"])
    faults += wrong
    same = sum(a == b for a, b in zip(chosen, answer.tokens, strict=True))
    texts = [tokenizer.decode(token for token in tokens if token not in stop) for tokens in (chosen, answer.tokens)]
    results |= {"answer": texts[0], "reference": texts[1], "same_tokens": same, "compared_tokens": len(chosen)}
    results["margins"] = _margins(answer.logits)
    say(f"  prompt     {_quoted(prompt)}\n  compiled   {_quoted(texts[0])}\n  reference  {_quoted(texts[1])}")
    say(f"  {_agreement(same, len(chosen), bool(wrong))}")
    return results


def _agreement(same: int, count: int, wrong: bool) -> str:
    """One line on how many tokens of the answer are the same, and why others pass."""
    line = f"{same} of {count} tokens are the same, each predicted from the reference's prefix"
    return line if same == count or wrong else f"{line}; the others are near ties, which rounding decides: passed"


def _quoted(text: str) -> str:
    """On one line: as it is, or as a Python string if it has line breaks, control characters or outer spaces."""
    return text if text.isprintable() and text == text.strip() else repr(text)


def compared(answer: Answer, ours: Floats, gap: float) -> tuple[list[int], list[str]]:
    """The bundle's token after each of the reference's; a fault if rounding does not explain a different choice."""
    chosen, faults = ours.argmax(axis=1).tolist(), []
    for at, (mine, theirs) in enumerate(zip(chosen, answer.tokens, strict=True)):
        margin = float(answer.logits[at, theirs] - answer.logits[at, mine])
        if not np.isfinite(ours[at]).all() or not margin <= gap:
            faults.append(
                f"token {at + 1} of the answer is {mine}, the reference says {theirs} by {margin:.2e}; "
                f"the measured errors explain {gap:.2e}"
            )
    return chosen, faults


def _margins(logits: Floats) -> list[float]:
    """The logit margin between the reference's first and second choice in each row."""
    top = np.partition(logits, -2, axis=1)[:, -2:]
    return [float(margin) for margin in top[:, 1] - top[:, 0]]


def _other_prompt(bundle: Bundle, checkpoint: Path, prompt: str) -> list[str]:
    """Faults if the runner's token ids for the prompt differ from AutoTokenizer's on the checkpoint."""
    from axc.reference import Refused, tokenizer

    ours, template = Tokenizer.find(bundle.hf), ChatTemplate.find(bundle.hf)
    if ours is None:
        return []
    try:
        theirs = tokenizer(checkpoint)
    except Refused as refused:
        return [str(refused)]
    if (template is None) != (theirs.chat_template is None):
        having, lacking = ("AutoTokenizer", "the bundle") if template is None else ("the bundle", "AutoTokenizer")
        return [f"{having} has a chat template, {lacking} has none"]
    pairs = [
        ("prompt", ours.encode(prompt), theirs.encode(prompt)),
        ("prompt without special tokens", ours.encode(prompt, False), theirs.encode(prompt, add_special_tokens=False)),
    ]
    if template is not None:
        mine = prompt_ids(ours, template, prompt, parse_special=True)
        pairs.append(("prompt in the chat template", mine, _templated(theirs, prompt, mine)))
    return [_difference(what, mine, other) for what, mine, other in pairs if mine != other]


def _templated(theirs: Any, prompt: str, wanted: list[int]) -> list[int]:
    """The prompt in AutoTokenizer's template, as text or as a list of parts; a template may expect either."""
    found: list[list[int]] = []
    for content in (prompt, [{"type": "text", "text": prompt}]):
        message = {"role": "user", "content": content}
        try:
            found.append(theirs.apply_chat_template([message], add_generation_prompt=True, return_dict=False))
        except Exception:  # the template may be written for the other form
            continue
    return wanted if wanted in found else [*found, []][0]


def _difference(what: str, ours: list[int], theirs: list[int]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return f"the {what} is {ours[at : at + 4]} from token {at + 1} on, {theirs[at : at + 4]} by AutoTokenizer"


def _rounding(weight_type: str, expected: Expected) -> list[str]:
    """The weight type, if it cannot represent all of the checkpoint's values."""
    return [] if weight_type in expected.exact else [weight_type]


def is_bfloat16(values: Floats) -> bool:
    """Whether every value is exact in bfloat16."""
    return not (values.view(np.uint32) & 0xFFFF).any()


def _line(entries: Sequence[Agreement]) -> str:
    """A part in one line: its worst figures over all stages."""
    worst = max(entries, key=lambda entry: entry.worst)
    cosine, rms = min(entry.cosine for entry in entries), max(entry.rms for entry in entries)
    return f"{worst.part:<9} cosine {cosine:.6f}  error {rms:.1e}, at worst {worst.worst:.1e} in {worst.stage}"


def _as_json(value: Any) -> Any:
    """Replaces infinities and NaN, which JSON lacks, by null."""
    if isinstance(value, dict):
        return {key: _as_json(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_as_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

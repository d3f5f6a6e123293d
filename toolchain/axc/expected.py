"""The reference's results for a check, computed before the bundle is loaded, so that both need not fit in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from axc import walk
from axc.walk import Step
from axrun.agreement import NOISE
from axrun.decoder import expect_room
from axrun.errors import BadInput, CheckFailed
from axrun.format.bundle import Bundle
from axrun.format.dtypes import FLOATS, from_float32, to_float32
from axrun.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from axc.build import Options
    from axc.reference import Reference, Trace

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

ANSWER_TOKENS = 32
HISTORY_BYTES = 1 << 30  # bound on the K/V rows of a probe, over all layers


@dataclass(frozen=True)
class Probe:
    """Tokens after a history of K and V rows [n, kv_size] per layer, and the reference's pass over them."""

    step: Step
    history: list[tuple[Floats, Floats]]
    trace: Trace


@dataclass(frozen=True)
class Answer:
    """A prompt's ids, the reference's greedy tokens, and the logits [n, vocab] of each."""

    asked: list[int]
    tokens: list[int]
    logits: Floats


@dataclass(frozen=True)
class Expected:
    """`ids` of the walk and the reference's pass over them; `reach` describes how far the check gets.

    `exact` are the weight types that represent every value of the checkpoint. `rows` are K and V of the walk, [n,
    kv_size] per layer, if requested and if the layers cache K and V.
    """

    ids: Ids
    trace: Trace
    probes: list[Probe]
    reach: str
    exact: frozenset[str]
    answer: Answer | None
    rows: list[tuple[Floats, Floats]] | None = None


def expect(options: Options, bundle: Bundle, prompt: str, asked: list[int], say: Callable[[str], None]) -> Expected:
    """Loads the reference and computes its results.

    Raises CheckFailed if transformers loads another model than the bundle's, BadInput if memory or the context do not
    suffice.
    """
    from axc.reference import NoReference, Reference, Refused

    try:
        reference = Reference(options.input_path, options.model_config, options.model_type, adapters=options.lora)
    except NoReference as unknown:
        raise CheckFailed(
            f"{unknown}: there is no reference to compare with\nBuild with --check_level 0, which runs every axmodel."
        ) from None
    except Refused as refused:
        raise CheckFailed(f"{refused}\nThe bundle was built from something else; do not ship it.") from None
    reference.set_context(bundle.kv_cache_len + 1)
    for remark in reference.remarks:
        say(f"  {remark}")
    return ask(reference, bundle, prompt, asked)


def ask(reference: Reference, bundle: Bundle, prompt: str, asked: list[int], *, keep_rows: bool = False) -> Expected:
    """Computes the reference's results. `asked` are the token ids to answer, empty for no answer.

    Raises CheckFailed if it is another model than the bundle's, BadInput if the context does not suffice.
    """
    count, cache, tokenizer = walk.length(bundle), reference.empty_cache(), Tokenizer.find(bundle.hf)
    ids = walk.sample(tokenizer.encode(prompt) if tokenizer else [], count, bundle.vocab_size)
    trace = reference.trace(ids, cache)
    _expect_shape(bundle, trace)
    probes, reach = _probe(bundle, reference, cache, count)
    answer = None
    if tokenizer and asked:
        expect_room(len(asked) + 1, bundle.kv_cache_len)
        if max(asked) >= bundle.vocab_size:
            raise BadInput(
                f"token id {max(asked)} of the prompt is outside the vocabulary of {bundle.vocab_size}\n"
                "Give another --prompt."
            )
        room = min(ANSWER_TOKENS, bundle.kv_cache_len - len(asked))
        tokens, logits = reference.generate(np.array([asked]), room, tokenizer.stop_ids, keep_logits=True)
        answer = Answer(asked, tokens[0].tolist(), logits[0])
    exact = frozenset(name for name in NOISE if reference.exact_in(name))
    rows = reference.cached_rows(cache) if keep_rows else None
    return Expected(ids, trace, probes, reach, exact, answer, rows)


def _expect_shape(bundle: Bundle, trace: Trace) -> None:
    seen = (len(trace.outputs), trace.outputs[0].shape[1], trace.logits.shape[1])
    if seen != (bundle.layers, bundle.hidden_size, bundle.vocab_size):
        raise CheckFailed(
            f"transformers reads a model of {seen[0]} layers, hidden size {seen[1]} and vocabulary {seen[2]}, "
            f"{bundle.path} has {bundle.layers}, {bundle.hidden_size} and {bundle.vocab_size}\nDo not ship it."
        )


def _probe(bundle: Bundle, reference: Reference, cache: Any, count: int) -> tuple[list[Probe], str]:
    """The probes after a walk of `count` tokens with K/V rows in `cache`, and how far the check gets."""
    context, dtype = bundle.kv_cache_len, FLOATS[bundle.hidden_state_type]
    if context <= count:
        return [], f"{count} tokens, the whole context"
    most = HISTORY_BYTES // (16 * bundle.layers * bundle.kv_size)
    found = []
    for step in walk.probes(bundle, count):
        if step.start > most:
            continue
        # Random rows reveal a shifted history, the trend a missing part of it.
        rows = np.random.default_rng(walk.SEED).integers(0, count, step.start)
        trend = np.linspace(-1, 1, step.start, dtype=np.float32)
        resumed = reference.resample_cache(
            cache, rows, trend, lambda values: to_float32(from_float32(values, dtype), dtype)
        )
        if resumed is None or resumed[1][0][0].shape[1] != bundle.kv_size:
            break
        ids = walk.sample([], step.stop, bundle.vocab_size)[step.start :]
        found.append(Probe(step, resumed[1], reference.trace(ids, resumed[0])))
    reach = f"{count} tokens"
    if found:
        reach += f" and behind {', '.join(str(probe.step.start) for probe in found)} rows of history"
    last = max((probe.step.stop for probe in found), default=count)
    ends = "the end" if last == context else f"position {last} only"
    return found, f"{reach}: to {ends} of the context of {context}"

"""The walk of a check: the token sequence to run, and the shape groups that it uses.

A walk prefills, decodes, prefills again after an odd number of cached rows, decodes to its end, rolls back and prefills
once more. This covers a chunked prompt, a second turn and a regenerated turn. If the context is longer than the walk,
probes test far positions after a history of K/V rows copied from the walk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from axrun.format.bundle import Bundle

WALK = 640  # most tokens of a walk; the whole context if that is shorter
DECODED_WALK = 96  # the same for a bundle without prefill, which runs one token at a time
DECODED = 3  # tokens of a decode stage
PROBE = 16  # tokens of a probe
SEED = 9  # of the random ids


class Step(NamedTuple):
    """Tokens [start, stop) in one forward pass."""

    stage: str
    start: int
    stop: int


def length(bundle: Bundle) -> int:
    """The number of tokens of the walk."""
    return min(bundle.kv_cache_len, WALK if bundle.prefill_len else DECODED_WALK)


def steps(prefill: int, count: int) -> Iterator[Step]:
    """The walk over `count` tokens of a bundle whose prefill chunk is `prefill` (0: decode only)."""
    if not prefill or count <= 2 * DECODED:
        yield from _decode(0, count)
        return
    end = count - DECODED
    first = min(prefill, end)
    yield Step("prefill", 0, first)
    again = min(first + DECODED, end)
    yield from _decode(first, again)
    for start in range(again, end, prefill):
        yield Step("history", start, min(start + prefill, end))
    yield from _decode(end, count)
    back = max(count - prefill - prefill // 2, 1)
    yield Step("rollback", back, min(back + prefill, count))


def _decode(start: int, stop: int) -> Iterator[Step]:
    for position in range(start, stop):
        yield Step("decode", position, position + 1)


def probes(bundle: Bundle, count: int) -> list[Step]:
    """Probes beyond the walk's `count` tokens: each group behind its full history, and the end of the context."""
    context = bundle.kv_cache_len
    if context <= count:
        return []
    starts = {min(group.history, context - PROBE) for group in bundle.groups if group.history > count}
    found = [Step("far", start, start + PROBE) for start in sorted({max(start, count) for start in starts})]
    return [*found, Step("end", context - DECODED, context)]


def sample(prompt: Sequence[int], count: int, vocabulary: int) -> NDArray[np.int64]:
    """`count` token ids: the prompt's, then random ids with a fixed seed.

    A repeated prompt would hide position errors, because distant rows would be equal.
    """
    spread = np.random.default_rng(SEED).integers(0, vocabulary, count)
    known = [token for token in prompt if token < vocabulary]
    return np.concatenate([np.array(known, np.int64), spread])[:count]

"""The stage `sampling`: the sampler on logits with known results, and post_config.json.

The expected values are computed here in plain Python from the definitions, independently of the sampler.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from axrun.doctor.report import Finding
from axrun.errors import BadInput
from axrun.format.bundle import Bundle
from axrun.sampling import SWITCHES, Sampling
from axrun.sampling.sampler import Sampler

STAGE = "sampling"
CODE = "axrun: board/axrun/sampling/"
LOGITS = (1.0, -2.0, 3.0, 0.5, 3.0, -0.25, 2.0, 0.0)  # tokens 2 and 4 tie: the lower id wins
PAST = (4, 1, 6)
SEEDED = (5, 2, 0, 0, 6, 7, 4, 5)  # draws from 8 equal tokens with numpy's PCG64, seed 0, whose sequence is fixed
CLOSE = 1e-5


@dataclass(frozen=True)
class Case:
    """Sampling settings applied to LOGITS after PAST, and the expected probabilities [vocab]."""

    name: str
    sampling: Sampling
    expected: Callable[[], list[float]]
    past: Sequence[int] = field(default=())


def sampling(bundle: Bundle, rows: Sequence[tuple[Any, int]] = ()) -> str | Finding:
    """Tests the sampler on known logits, then on `rows`: logits [vocab] with their most likely token.

    Also checks post_config.json.
    """
    found = _known() or _seeded() or _post_config(bundle)
    if found:
        return found
    for number, (logits, expected) in enumerate(rows):
        token = Sampler(Sampling())(np.asarray(logits, np.float32))
        if token != expected:
            return _finding(f"greedy, row {number} of the reference", CODE, f"token {expected}", f"token {token}")
    also = f", {len(rows)} rows of the reference" if rows else ""
    return f"{len(CASES) + 3} known answers{also}; post_config.json is greedy"


def _known() -> Finding | None:
    logits = np.array(LOGITS, np.float32)
    token = Sampler(Sampling())(logits)
    if token != 2:
        return _finding("greedy, two equal logits", CODE, "token 2, the lower id", f"token {token}")
    token = Sampler(Sampling(repetition_penalty=2.0))(logits, (2, 4))
    if token != 6:
        return _finding("greedy with a repetition penalty", CODE, "token 6", f"token {token}")
    for case in CASES:
        expected = case.expected()
        shares = Sampler(case.sampling).weights(logits, case.past).astype(np.float64)
        shares = shares / shares.sum()
        if not np.allclose(shares, expected, rtol=CLOSE, atol=CLOSE):
            wrong = int(np.abs(shares - expected).argmax())
            return _finding(
                case.name, CODE, f"token {wrong} with probability {expected[wrong]:.5f}", f"{shares[wrong]:.5f}"
            )
    return None


def _seeded() -> Finding | None:
    """Checks that a seed gives the documented sequence of numpy's generator."""
    sampler = Sampler(Sampling(temperature=1.0), seed=0)
    drawn = tuple(sampler(np.zeros(8, np.float32)) for _ in SEEDED)
    if drawn == SEEDED:
        return None
    return _finding("draws with seed 0", "numpy", f"tokens {SEEDED}", f"{drawn}")


def _post_config(bundle: Bundle) -> Finding | None:
    try:
        sampling = Sampling.from_post_config(bundle.post_config)
    except BadInput as failure:
        return Finding(
            STAGE,
            "post_config.json",
            "post_config.json",
            "the nine keys of the vendor's runner, each in its range",
            str(failure).partition("\n")[0],
            "edited by hand",
            "Fix the value, or build the bundle again.",
        )
    if sampling != Sampling(penalty_window=sampling.penalty_window):
        switches = ", ".join(name for name in SWITCHES if bundle.post_config.get(name) is True)
        return Finding(
            STAGE,
            "post_config.json",
            "post_config.json",
            "greedy, as a build writes it",
            f"{switches}: true",
            "edited by hand: answers are sampled or penalised, not greedy",
            "If that is intended, build again to update the manifest; otherwise copy or build the bundle again.",
        )
    return None


def _softmax(logits: Sequence[float], temperature: float = 1.0, kept: Sequence[int] | None = None) -> list[float]:
    ids = range(len(logits)) if kept is None else kept
    shares = [math.exp(logits[i] / temperature) if i in ids else 0.0 for i in range(len(logits))]
    return [share / math.fsum(shares) for share in shares]


def _likeliest(logits: Sequence[float]) -> list[int]:
    """Ids by falling logit; ties by id."""
    return sorted(range(len(logits)), key=lambda i: (-logits[i], i))


def _nucleus(logits: Sequence[float], top_p: float) -> list[int]:
    """The smallest set of most likely tokens with a total probability of `top_p`."""
    kept, held = [], 0.0
    shares = _softmax(logits)
    for token in _likeliest(logits):
        if held >= top_p:
            break
        kept.append(token)
        held += shares[token]
    return kept


def _penalised(penalty: float, past: Sequence[int]) -> list[float]:
    return [x if i not in past else x * penalty if x < 0 else x / penalty for i, x in enumerate(LOGITS)]


CASES = (
    Case("temperature 1", Sampling(temperature=1.0), lambda: _softmax(LOGITS)),
    Case("temperature 0.5", Sampling(temperature=0.5), lambda: _softmax(LOGITS, 0.5)),
    Case("temperature 2", Sampling(temperature=2.0), lambda: _softmax(LOGITS, 2.0)),
    Case("top-k 1", Sampling(temperature=1.0, top_k=1), lambda: _softmax(LOGITS, kept=_likeliest(LOGITS)[:1])),
    Case("top-k 3", Sampling(temperature=1.0, top_k=3), lambda: _softmax(LOGITS, kept=_likeliest(LOGITS)[:3])),
    Case("top-p 0.5", Sampling(temperature=1.0, top_p=0.5), lambda: _softmax(LOGITS, kept=_nucleus(LOGITS, 0.5))),
    Case("top-p 0.9", Sampling(temperature=1.0, top_p=0.9), lambda: _softmax(LOGITS, kept=_nucleus(LOGITS, 0.9))),
    Case(
        "repetition penalty 1.5",
        Sampling(temperature=1.0, repetition_penalty=1.5),
        lambda: _softmax(_penalised(1.5, PAST)),
        PAST,
    ),
    Case(
        "repetition penalty 1.5 over the last 2 tokens",
        Sampling(temperature=1.0, repetition_penalty=1.5, penalty_window=2),
        lambda: _softmax(_penalised(1.5, PAST[-2:])),
        PAST,
    ),
)


def _finding(part: str, file: str, expected: str, seen: str) -> Finding:
    return Finding(
        STAGE,
        part,
        file,
        expected,
        seen,
        "axrun or numpy on this machine is damaged or differs from the release; the bundle is not at fault",
        "Install axrun again, or deploy it again.",
    )

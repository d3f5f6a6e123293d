"""How far a bundle may lie from its float32 reference: what is measured, and the bounds.

A layer's error is measured on its update (output minus input), which the residual stream would hide, and without what
the hidden state's own rounding explains. Whole models are compared by their logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from axrun.format.dtypes import FLOATS, from_float32, to_float32

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

ROUNDING = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}  # most relative error of the nearest value
SMALLEST = {"fp32": 2.0**-149, "fp16": 2.0**-25, "bf16": 2.0**-134}  # most error below the normal range
LEAST_UPDATE = 0.02  # of the output's norm: an update smaller than this is measured as if it had it


class Noise(NamedTuple):
    """What a type may cost: relative errors of a part alone (root mean square of rows, one row), and of a whole model
    (root mean square of its logits' relative errors, mean KL divergence in nats)."""

    rms: float
    row: float
    logits: float
    kld: float


# Two to ten times the worst measured: a trained SmolLM2-135M (30 layers, on text and on random tokens), tiny-qwen2, and
# random models of 2 to 6 layers. Update errors, rms and one row: fp32 1.2e-6, 3.5e-6; fp16 1.5e-3, 4.7e-3; bf16 0.012,
# 0.035; s8 0.033, 0.11; s4 0.47, 1.8. KL divergence: fp32 2e-11, fp16 6e-6, bf16 4e-4, s8 0.010, s4 0.95.
# 8-bit floats, in SmolLM2's head too, whose error is the largest: E4M3 0.21, 0.27, KL divergence 0.10.
# A part that does nothing has an error of 1, logits that have nothing to do with the reference's one of 1.4.
NOISE = {
    "fp32": Noise(1e-5, 5e-5, 1e-4, 1e-8),
    "fp16": Noise(5e-3, 0.02, 0.02, 1e-4),
    "bf16": Noise(0.03, 0.12, 0.1, 5e-3),
    "s8": Noise(0.08, 0.3, 0.25, 0.025),
    "s4": Noise(0.8, 5.0, 1.2, 1.5),
    "fp8_e4m3": Noise(0.45, 1.5, 0.9, 0.4),
    "fp8_e5m2": Noise(0.8, 3.0, 1.2, 1.2),
}
# The errors of a stage over those of the first one, geometric mean over the layers: at most 1.30 was measured without a
# fault; 1.9 to 3.4 where one cached row of 200 is hidden. Below NEGLIGIBLE it is the order of sums in float32.
RISE = 1.7
NEGLIGIBLE = 1e-4
QUIET = np.errstate(invalid="ignore", over="ignore")  # what is not finite is found by the bounds
GAP = 8.0  # root mean square errors of a logit by which the reference may prefer its token to the bundle's


def explained(*types: str) -> Noise:
    """What several types may cost together."""
    return Noise(*(sum(values) for values in zip(*(NOISE[name] for name in types))))


class Rows(NamedTuple):
    """Of rows [n]: their cosine with the reference's, and their relative error."""

    cosine: Doubles
    error: Doubles


@dataclass(frozen=True)
class Agreement:
    """How a part agrees with the reference in a stage: least cosine of a row, relative errors over `rows` rows.

    `rms` and `worst` are of a layer's updates, or of the post model's centred logits.
    """

    part: str
    stage: str
    rows: int
    cosine: float
    rms: float
    worst: float

    @classmethod
    def of(cls, part: str, stage: str, rows: Rows) -> Agreement:
        error = np.where(np.isfinite(rows.error), rows.error, np.inf)
        rms = float(np.sqrt((error**2).mean()))
        return cls(part, stage, len(error), float(rows.cosine.min()), rms, float(error.max()))

    def fault(self, noise: Noise) -> str:
        """What is wrong, in words; empty where nothing is."""
        for name, value, most in (("error", self.rms, noise.rms), ("worst error", self.worst, noise.row)):
            if not value <= most:
                return f"{self.part} in {self.stage} has {name} {value:.2e}, expected at most {most:.2e}"
        return ""


def rises(layers: Sequence[Agreement]) -> Iterator[str]:
    """Stages in which the layers' errors are larger than in their first stage: what rounding does not depend on."""
    first: dict[str, Agreement] = {}
    ratios: dict[str, list[float]] = {}
    for entry in layers:
        start = first.setdefault(entry.part, entry)
        if start.rms > NEGLIGIBLE:
            ratios.setdefault(entry.stage, []).append(float(np.log(entry.rms / start.rms)))
    for stage, logarithms in ratios.items():
        rise = float(np.exp(np.mean(logarithms)))
        if not rise <= RISE:
            yield f"the layers' errors rise by {rise:.2f} in {stage}, expected at most {RISE}"


@QUIET
def update_errors(ours: Floats, reference: Floats, given: Floats, hidden_type: str) -> Rows:
    """Compares a layer's outputs [n, hidden] for the inputs `given`, which it saw rounded to `hidden_type`."""
    dtype = FLOATS[hidden_type]
    seen = to_float32(from_float32(given, dtype), dtype)
    out, expected = ours.astype(np.float64), reference.astype(np.float64)
    moved = seen.astype(np.float64) - given  # the input's rounding passes through the residual connection
    error = np.abs(out - expected - moved)
    error = np.maximum(error - ROUNDING[hidden_type] * np.abs(expected + moved) - SMALLEST[hidden_type], 0)
    error = np.where(np.isfinite(out), error, np.inf)
    scale = np.maximum(_norm(expected - given), LEAST_UPDATE * _norm(expected))
    return Rows(cosines(out, expected), _norm(error) / np.maximum(scale, 1e-300))


@QUIET
def logit_errors(ours: Floats, reference: Floats) -> Rows:
    """Compares rows of logits [n, vocab], their means left out: softmax does not see them."""
    a, b = centred(ours), centred(reference)
    return Rows(cosines(a, b), _norm(a - b) / np.maximum(_norm(b), 1e-300))


def centred(logits: Floats) -> Doubles:
    values = logits.astype(np.float64)
    return np.asarray(values - values.mean(axis=1, keepdims=True))


@QUIET
def cosines(a: NDArray[np.floating], b: NDArray[np.floating]) -> Doubles:
    """Of rows [n, width]; 1 where both are zero."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = _norm(a) * _norm(b)
    return np.asarray(np.where(norms == 0, (a == b).all(axis=1), (a * b).sum(axis=1) / np.where(norms == 0, 1, norms)))


@QUIET
def divergence(reference: Floats, ours: Floats) -> Doubles:
    """KL(reference || ours) in nats for rows of logits [n, vocab]: [n]."""
    p, q = _log_softmax(reference), _log_softmax(ours)
    return np.asarray((np.exp(p) * (p - q)).sum(axis=1))


def _log_softmax(logits: Floats) -> Doubles:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _norm(rows: NDArray[np.floating]) -> Doubles:
    return np.asarray(np.linalg.norm(rows.astype(np.float64), axis=1))

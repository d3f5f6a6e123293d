"""Error metrics and tolerances of a bundle against its float32 reference.

The error of a layer is measured on its update (output minus input): the residual stream would hide it. The rounding of
the hidden state itself is subtracted. Whole models are compared by their logits.
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

ROUNDING = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}  # maximum relative rounding error
SMALLEST = {"fp32": 2.0**-149, "fp16": 2.0**-25, "bf16": 2.0**-134}  # maximum rounding error of subnormal values
LEAST_UPDATE = 0.02  # relative to the output's norm: lower bound of the update's norm in the denominator


class Noise(NamedTuple):
    """Tolerances of a type: relative errors of a single part (root mean square over rows, worst row) and of a whole
    model (root mean square of the relative error of logits, mean KL divergence in nats).
    """

    rms: float
    row: float
    logits: float
    kld: float


# Two to ten times the worst measured: a trained SmolLM2-135M (30 layers, on text and on random tokens), tiny-qwen2, and
# random models of 2 to 6 layers. Update errors, rms and one row: fp32 1.2e-6, 3.5e-6; fp16 1.5e-3, 4.7e-3; bf16 0.012,
# 0.035; s8 0.033, 0.11; s4 0.47, 1.8. KL divergence: fp32 2e-11, fp16 6e-6, bf16 4e-4, s8 0.010, s4 0.95.
# 8-bit floats: the error is largest in SmolLM2's head. E4M3 0.21, 0.27, KL divergence 0.10; E5M2 0.41, 0.53, 0.40.
# For comparison: a part that computes nothing has an error of 1, uncorrelated logits one of 1.4.
NOISE = {
    "fp32": Noise(1e-5, 5e-5, 1e-4, 1e-8),
    "fp16": Noise(5e-3, 0.02, 0.02, 1e-4),
    "bf16": Noise(0.03, 0.12, 0.1, 5e-3),
    "s8": Noise(0.08, 0.3, 0.25, 0.025),
    "s4": Noise(0.8, 5.0, 1.2, 1.5),
    "fp8_e4m3": Noise(0.45, 1.5, 0.9, 0.4),
    "fp8_e5m2": Noise(0.8, 3.0, 1.2, 1.2),
}
# Ratio of the errors of a stage to those of the first stage, geometric mean over the layers. Measured: at most 1.30
# without a fault, 1.9 to 3.4 if one cached row of 200 is masked. Errors below NEGLIGIBLE are float32 summation order.
RISE = 1.7
NEGLIGIBLE = 1e-4
QUIET = np.errstate(invalid="ignore", over="ignore")  # values that are not finite exceed the bounds anyway
GAP = 8.0  # maximum logit gap between the two top tokens, in root mean square errors of a logit


def explained(*types: str) -> Noise:
    """The combined tolerance of several types."""
    return Noise(*(sum(values) for values in zip(*(NOISE[name] for name in types))))


class Rows(NamedTuple):
    """For each row [n]: cosine with the reference, and relative error."""

    cosine: Doubles
    error: Doubles


@dataclass(frozen=True)
class Agreement:
    """Agreement of a part with the reference in one stage: minimum cosine and relative errors over `rows` rows.

    `rms` and `worst` are errors of a layer's update, or of the post model's centred logits.
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
        """Describes the violated tolerance; empty if there is none."""
        for name, value, most in (("error", self.rms, noise.rms), ("worst error", self.worst, noise.row)):
            if not value <= most:
                return f"{self.part} in {self.stage} has {name} {value:.2e}, expected at most {most:.2e}"
        return ""


def rises(layers: Sequence[Agreement]) -> Iterator[str]:
    """Yields stages with larger errors than the first one. Rounding does not explain that."""
    first: dict[str, Agreement] = {}
    ratios: dict[str, list[float]] = {}
    for entry in layers:
        start = first.setdefault(entry.part, entry)
        if start.rms > NEGLIGIBLE:
            ratios.setdefault(entry.stage, []).append(float(np.log(entry.rms / start.rms)))
    for stage, logarithms in ratios.items():
        rise = float(np.exp(np.mean(logarithms)))
        if not rise <= RISE:
            yield f"the layers' errors rise by a factor of {rise:.2f} in {stage}, expected at most {RISE}"


@QUIET
def update_errors(ours: Floats, reference: Floats, given: Floats, hidden_type: str) -> Rows:
    """Errors of a layer's outputs [n, hidden] for the inputs `given`, which the layer got rounded to `hidden_type`."""
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
    """Errors of logits [n, vocab] after subtracting the row means, which softmax ignores."""
    a, b = centred(ours), centred(reference)
    return Rows(cosines(a, b), _norm(a - b) / np.maximum(_norm(b), 1e-300))


def centred(logits: Floats) -> Doubles:
    values = logits.astype(np.float64)
    return np.asarray(values - values.mean(axis=1, keepdims=True))


@QUIET
def cosines(a: NDArray[np.floating], b: NDArray[np.floating]) -> Doubles:
    """Cosine of each pair of rows [n, width]; 1 if both are zero."""
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

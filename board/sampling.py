"""From logits to the next token: repetition penalty, temperature, top-k, top-p, in the order of transformers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from board.errors import BadInput, CheckFailed

Floats = NDArray[np.float32]

# Shares of the likeliest token's probability. A cut keeps the candidates few, so that no 150,000 tokens are sorted.
CUTS = (1e-2, 1e-4, 1e-7, 0.0)

# What a value must be: (types, condition, in words).
RULES: dict[str, tuple[tuple[type, ...], Callable[[Any], bool], str]] = {
    "temperature": ((int, float), lambda value: value == 0 or 1e-3 <= value <= 100, "0 (greedy) or 0.001 to 100"),
    "repetition_penalty": ((int, float), lambda value: 0 < value <= 100, "a number above 0 (1 is none), up to 100"),
    "penalty_window": ((int,), lambda value: value >= 0, "a whole number of tokens from 0 on"),
    "top_p": ((int, float), lambda value: 0 < value <= 1, "a number above 0, up to 1 (1 is off)"),
    "top_k": ((int,), lambda value: value >= 0, "a whole number from 0 (off) on"),
}
SWITCHES = {
    "enable_temperature": "temperature",
    "enable_repetition_penalty": "repetition_penalty",
    "enable_top_p_sampling": "top_p",
    "enable_top_k_sampling": "top_k",
}


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; as it is, the likeliest one always (greedy).

    `penalty_window` is how many of the last tokens, of prompt and answer, the repetition penalty looks at (None: all).
    Raises BadInput for a value out of range.
    """

    temperature: float = 0.0
    repetition_penalty: float = 1.0
    penalty_window: int | None = None
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (field.name == "penalty_window" and value is None):
                _check(field.name, value)

    @classmethod
    def from_post_config(cls, config: Mapping[str, Any]) -> Sampling:
        """The vendor's post_config.json: all nine keys, checked whether switched on or not.

        top_p wins over top_k; with neither the likeliest token is taken, whatever the temperature.
        Raises BadInput naming a key that is missing, unknown or out of range.
        """
        expected = [*SWITCHES, *RULES]
        unknown, missing = sorted(set(config) - set(expected)), [key for key in expected if key not in config]
        if unknown or missing:
            what = f"has unknown keys {unknown}" if unknown else f"lacks {missing}"
            raise BadInput(f"post_config.json {what}; it has these: {', '.join(expected)}")
        for key in SWITCHES:
            if not isinstance(config[key], bool):
                raise BadInput(f"{key} is {config[key]!r}, expected true or false")
        for key in RULES:
            _check(key, config[key])
        on = {key: config[key] for switch, key in SWITCHES.items() if config[switch]}
        drawn = {key: on[key] for key in ("top_p", "top_k") if key in on}
        return cls(
            temperature=on.get("temperature", 1.0) if drawn else 0.0,
            repetition_penalty=on.get("repetition_penalty", 1.0),
            penalty_window=config["penalty_window"],
            **dict(list(drawn.items())[:1]),
        )

    def override(self, **given: float | None) -> Sampling:
        """With the values that are not None in place of its own; top_p or top_k alone turns greedy into drawing."""
        given = {key: value for key, value in given.items() if value is not None}
        if (given.get("top_p") or given.get("top_k")) and self.temperature == 0:
            given.setdefault("temperature", 1.0)
        return dataclasses.replace(self, **given)  # type: ignore[arg-type]


class Sampler:
    """Draws tokens; the same seed and logits give the same tokens."""

    def __init__(self, sampling: Sampling, seed: int | None = None) -> None:
        self.sampling = sampling
        self._random = np.random.Generator(np.random.PCG64(seed))

    def __call__(self, logits: Floats, past: Sequence[int] = ()) -> int:
        """The next token after `past`, for float32 logits [vocab]. Raises CheckFailed when they are not finite."""
        if self.sampling.temperature == 0:
            logits = penalised(logits, past, self.sampling)
            token = int(logits.argmax())
            _finite(logits[token])
            return token
        ids, probabilities = distribution(logits, past, self.sampling)
        drawn = np.searchsorted(np.cumsum(probabilities), self._random.random(), side="right")
        return int(ids[min(int(drawn), len(ids) - 1)])


def distribution(
    logits: Floats, past: Sequence[int], sampling: Sampling
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """What a token is drawn from, at a temperature above 0: ids and probabilities.

    With top_k or top_p the likeliest come first, equal ones in the order of their ids.
    Raises CheckFailed when the logits are not finite.
    """
    scaled = penalised(logits, past, sampling) / np.float32(sampling.temperature)
    peak = scaled.max()
    _finite(peak)
    weights = np.exp(scaled - peak)
    total = float(weights.sum(dtype=np.float64))
    if not sampling.top_k and sampling.top_p == 1:
        return np.arange(len(weights)), weights / total
    limit = sampling.top_k or len(weights)
    share = sampling.top_p if sampling.top_p < 1 else math.inf
    for cut in CUTS:
        ids = np.flatnonzero(weights >= cut)
        if len(ids) >= limit or (limit == len(weights) and float(weights[ids].sum(dtype=np.float64)) >= share * total):
            break
    if limit < len(ids):
        ids = np.sort(ids[np.argpartition(weights[ids], len(ids) - limit)[len(ids) - limit :]])
    ids = ids[np.argsort(-weights[ids], kind="stable")]
    kept = weights[ids].astype(np.float64)
    mass = kept.sum() if sampling.top_k else total
    # the smallest head that holds the share: a token stays while those before it hold less
    nucleus = 1 + int(np.searchsorted(np.cumsum(kept)[:-1], share * mass, side="left"))
    kept = kept[:nucleus]
    return ids[:nucleus], kept / kept.sum()


def penalised(logits: Floats, past: Sequence[int], sampling: Sampling) -> Floats:
    """Logits with those of recent tokens divided by the penalty, or multiplied where they are negative.

    Keskar et al., CTRL, https://arxiv.org/abs/1909.05858, section 4.1, as transformers has it.
    """
    window = len(past) if sampling.penalty_window is None else min(sampling.penalty_window, len(past))
    if sampling.repetition_penalty == 1 or not window:
        return logits
    recent = np.unique(np.asarray(past[-window:], np.int64))
    logits = logits.copy()
    penalty = np.float32(sampling.repetition_penalty)
    logits[recent] = np.where(logits[recent] < 0, logits[recent] * penalty, logits[recent] / penalty)
    return logits


def _check(key: str, value: object) -> None:
    types, holds, words = RULES[key]
    if isinstance(value, bool) or not isinstance(value, types) or not holds(value):
        raise BadInput(f"{key} is {value!r}, expected {words}")


def _finite(value: np.float32) -> None:
    if not np.isfinite(value):
        raise CheckFailed(
            f"the model gave a logit of {value}: it overflows or its files are damaged\n"
            "Run `axrun run --verify`, or build with --hidden_state_type bf16 or fp32."
        )

"""From logits to the next token: repetition penalty, temperature, top-k, top-p, in the order of transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from axrun.errors import BadInput, CheckFailed

Floats = NDArray[np.float32]

BUCKET_BITS = 16  # of a float32 that are left out to sort weights roughly: two in a bucket differ by less than 1 %
BLOCK = 512  # weights that are summed, or held against each other, before one among them is looked for
PEAK = 64  # likeliest tokens that are asked first whether they hold the share of top_p

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


class Scratch:
    """Arrays [vocab] that every token uses again: to touch fresh memory takes longer than what is computed in it."""

    def __init__(self, vocab: int) -> None:
        self.kept = np.empty(vocab, np.float32)
        self.worth = np.empty(vocab, np.float64)
        self.buckets = np.empty(vocab, np.intp)
        self.chosen = np.empty(vocab, np.bool_)


class Sampler:
    """Draws tokens; the same seed and logits give the same tokens."""

    def __init__(self, sampling: Sampling, seed: int | None = None) -> None:
        self.sampling = sampling
        self._random = np.random.Generator(np.random.PCG64(seed))
        self._scratch = Scratch(0)

    def __call__(self, logits: Floats, past: Sequence[int] = ()) -> int:
        """The next token after `past`, for float32 logits [vocab]. Raises CheckFailed when they are not finite."""
        if len(logits) != len(self._scratch.kept):
            self._scratch = Scratch(len(logits))
        if self.sampling.temperature == 0:
            logits = penalised(logits, past, self.sampling, self._scratch.kept)
            token = int(logits.argmax())
            _finite(logits[token])
            return token
        return draw(weights(logits, past, self.sampling, self._scratch), self._random.random())


def weights(logits: Floats, past: Sequence[int], sampling: Sampling, scratch: Scratch | None = None) -> Floats:
    """What a token is drawn from, at a temperature above 0: shares [vocab] of no particular sum, 0 for what is cut.

    Of equal tokens the lower ids stay. They lie in `scratch`, if it is given. Raises CheckFailed when the logits are
    not finite.
    """
    scratch = Scratch(len(logits)) if scratch is None else scratch
    kept = scratch.kept
    np.divide(penalised(logits, past, sampling, kept), np.float32(sampling.temperature), out=kept)
    peak = kept.max()
    _finite(peak)
    np.exp(np.subtract(kept, peak, out=kept), out=kept)
    top_k = sampling.top_k if sampling.top_k < len(kept) else 0
    if not top_k and sampling.top_p == 1:
        return kept
    need = 0.0 if top_k else sampling.top_p * float(kept.sum(dtype=np.float64))
    ids = likeliest(kept, top_k or PEAK, scratch)
    few = Scratch(len(ids))
    few.kept[:] = kept[ids]
    if top_k:
        keep_head(few.kept, None, top_k, few)
        need = sampling.top_p * float(few.kept.sum(dtype=np.float64))
    elif float(few.kept.sum(dtype=np.float64)) < need:  # a flat distribution
        np.copyto(scratch.worth, kept)
        return keep_head(kept, scratch.worth, need, scratch)
    if sampling.top_p < 1:
        few.worth[:] = few.kept
        keep_head(few.kept, few.worth, need, few)
    kept.fill(0)
    kept[ids] = few.kept
    return kept


def likeliest(kept: Floats, count: int, scratch: Scratch) -> NDArray[np.intp]:
    """Ids, in order, among which are those of the `count` largest weights, and few others where `count` is small."""
    peaks = np.maximum.reduceat(kept, np.arange(0, len(kept), BLOCK))
    if count > len(peaks):
        return np.arange(len(kept))
    least = np.partition(peaks, -count)[-count]  # so many blocks have a weight at least as large
    return np.flatnonzero(np.greater_equal(kept, least, out=scratch.chosen))


def keep_head(kept: Floats, worth: NDArray[np.float64] | None, need: float, scratch: Scratch) -> Floats:
    """Sets to 0 the weights [vocab] behind the fewest likeliest that are worth `need` together; None: each is worth 1.

    Floats that are not negative are in the order of their bits. So their upper bits sort them into buckets, and only
    the bucket in which the need is met has to be sorted.
    """
    buckets, chosen = scratch.buckets, scratch.chosen
    np.right_shift(kept.view(np.uint32), BUCKET_BITS, out=buckets, casting="unsafe")
    held = np.cumsum(np.bincount(buckets, worth)[::-1])
    place = min(int(np.searchsorted(held, need)), len(held) - 1)
    last = len(held) - 1 - place
    ids = np.flatnonzero(np.equal(buckets, last, out=chosen))
    ids = ids[np.argsort(-kept[ids], kind="stable")]
    before = held[place - 1] if place else 0
    shares = np.ones(len(ids)) if worth is None else worth[ids]
    ids = ids[: 1 + int(np.searchsorted(before + np.cumsum(shares)[:-1], need))]
    stay = kept[ids]
    np.multiply(kept, np.greater(buckets, last, out=chosen), out=kept)
    kept[ids] = stay
    return kept


def draw(kept: Floats, chance: float) -> int:
    """The token at `chance`, from 0 up to 1, of the way through weights [vocab] that lie side by side."""
    ends = np.cumsum(np.add.reduceat(kept, np.arange(0, len(kept), BLOCK), dtype=np.float64))
    target = min(chance * ends[-1], np.nextafter(ends[-1], 0))
    block = int(np.searchsorted(ends, target, side="right"))
    start = block * BLOCK
    inside = kept[start : start + BLOCK]
    sums = np.cumsum(inside, dtype=np.float64) + (ends[block - 1] if block else 0.0)
    place = int(np.searchsorted(sums, target, side="right"))
    return start + (place if place < len(sums) else int(np.flatnonzero(inside)[-1]))  # summed in another order


def penalised(logits: Floats, past: Sequence[int], sampling: Sampling, out: Floats) -> Floats:
    """Logits with those of recent tokens divided by the penalty, or multiplied where they are negative, in `out`.

    The logits themselves where there is no penalty.
    Keskar et al., CTRL, https://arxiv.org/abs/1909.05858, section 4.1, as transformers has it.
    """
    window = len(past) if sampling.penalty_window is None else min(sampling.penalty_window, len(past))
    if sampling.repetition_penalty == 1 or not window:
        return logits
    recent = np.unique(np.asarray(past[-window:], np.int64))
    penalty = np.float32(sampling.repetition_penalty)
    np.copyto(out, logits)
    out[recent] = np.where(logits[recent] < 0, logits[recent] * penalty, logits[recent] / penalty)
    return out


def _check(key: str, value: object) -> None:
    types, holds, words = RULES[key]
    if isinstance(value, bool) or not isinstance(value, types) or not holds(value):
        raise BadInput(f"{key} is {value!r}, expected {words}")


def _finite(value: np.float32) -> None:
    if not np.isfinite(value):
        raise overflow(value)


def overflow(logit: np.float32) -> CheckFailed:
    """The error for a logit that is not finite."""
    return CheckFailed(
        f"the model gave a logit of {logit}: it overflows or its files are damaged\n"
        "Run `axrun run --verify`, or build with --hidden_state_type bf16 or fp32."
    )

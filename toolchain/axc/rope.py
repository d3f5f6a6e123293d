"""Rotary tables that are bit-identical on every machine.

cos, sin and pow of libm and numpy differ in the last bit between processors and versions; IEEE addition and
multiplication, and Python's decimal, do not.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields, replace
from decimal import Decimal, localcontext

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding. `kind` is default, linear (with `factor`), llama3, yarn or longrope.

    `partial` is the share of a head that is rotated, its first elements; `attention_factor` multiplies cosines and
    sines; `divisors` are longrope's, one for each frequency, `long_divisors` those of contexts beyond the original
    length. Frequencies as in transformers' modeling_rope_utils.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0
    partial: float = 1.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    divisors: tuple[float, ...] = ()
    long_divisors: tuple[float, ...] = ()

    def __str__(self) -> str:
        """The values that differ from the defaults, divisors as their number."""
        shown = [f"theta={self.theta!r}"]
        for each in fields(self)[1:]:
            value = getattr(self, each.name)
            if value != each.default:
                shown.append(f"{each.name}={f'[{len(value)}]' if isinstance(value, tuple) else repr(value)}")
        return f"Rope({', '.join(shown)})"

    def long(self, positions: int) -> bool:
        """Whether a context is beyond the original length of a longrope: all of its positions have other frequencies.

        transformers decides by the length of each sequence, and computes K anew where one grows beyond; a bundle's
        tables are fixed, so its context decides.
        """
        return self.kind == "longrope" and positions > self.original_max_position_embeddings

    def width(self, head_dim: int) -> int:
        """How many elements of a head are rotated."""
        return int(head_dim * self.partial)


# pi/2 in three parts; the first two have 33 significant bits, so that k * part is exact for k < 2**20
PI_2_HEAD, PI_2_MIDDLE, PI_2_TAIL = (
    float.fromhex("0x1.921fb544p+0"),
    float.fromhex("0x1.0b4611a6p-34"),
    float.fromhex("0x1.3198a2e037073p-69"),
)
SIN_TERMS = tuple((-1) ** n / math.factorial(2 * n + 1) for n in range(9))
COS_TERMS = tuple((-1) ** n / math.factorial(2 * n) for n in range(10))


def frequencies(rope: Rope, head_dim: int) -> NDArray[np.float32]:
    """Inverse frequencies [rotated elements / 2], rounded to float32 as transformers has them."""
    with localcontext() as context:
        context.prec = 40
        width = rope.width(head_dim)
        theta, dim = Decimal(rope.theta), Decimal(width)
        inverse = [theta ** (-Decimal(2 * i) / dim) for i in range(width // 2)]
        if rope.kind == "linear":
            inverse = [f / Decimal(rope.factor) for f in inverse]
        if rope.kind == "llama3":
            inverse = [_llama3(f, rope) for f in inverse]
        if rope.kind == "yarn":
            inverse = _yarn(inverse, rope, width)
        if rope.kind == "longrope":
            inverse = [f / Decimal(divisor) for f, divisor in zip(inverse, rope.divisors, strict=True)]
        return np.array([float(f) for f in inverse], np.float64).astype(np.float32)


def _llama3(frequency: Decimal, rope: Rope) -> Decimal:
    """Long waves are stretched by `factor`, short ones kept, those between blended."""
    factor, low, high = (Decimal(x) for x in (rope.factor, rope.low_freq_factor, rope.high_freq_factor))
    turns = rope.original_max_position_embeddings * frequency / (2 * Decimal(math.pi))
    if turns < low:
        return frequency / factor
    if turns > high:
        return frequency
    smooth = (turns - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


def logarithm(x: float) -> float:
    """The natural one, the same on every machine."""
    with localcontext() as context:
        context.prec = 40
        return float(Decimal(x).ln())


def _yarn(inverse: list[Decimal], rope: Rope, width: int) -> list[Decimal]:
    """Short waves are kept, long ones stretched, those between on a ramp: https://arxiv.org/abs/2309.00071"""

    def place(turns: float) -> float:
        """Index of the frequency that turns so often within the original context."""
        within = logarithm(rope.original_max_position_embeddings / (turns * 2 * math.pi))
        return width * within / (2 * logarithm(rope.theta))

    low, high = place(rope.beta_fast), place(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    span = Decimal(high - low) if high != low else Decimal("0.001")
    found = []
    for i, frequency in enumerate(inverse):
        ramp = min(max((Decimal(i) - Decimal(low)) / span, Decimal(0)), Decimal(1))
        found.append(frequency / Decimal(rope.factor) * ramp + frequency * (1 - ramp))
    return found


@dataclass(frozen=True)
class Tables:
    """cos and sin [rows, rotated elements / 2] of every position, or of parts of positions that are added.

    With `low`, position p = high * len(low) + rest; `high` has a row for each multiple of len(low), `low` one for each
    rest, and the angles' addition theorem gives the position's.
    """

    high: tuple[NDArray[np.float32], NDArray[np.float32]]
    low: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None


def rows(positions: int) -> tuple[int, int]:
    """How many rows the high and the low tables have; low 0 where one table is not larger than both."""

    def both(low: int) -> int:
        return low + -(-positions // low)

    low = min((1 << bits for bits in range(positions.bit_length())), key=both)
    return (-(-positions // low), low) if both(low) < positions else (positions, 0)


@functools.lru_cache(maxsize=4)
def tables(rope: Rope, head_dim: int, positions: int) -> Tables:
    """The rotary tables of a context. `attention_factor` is in those of whole positions or of their high parts."""
    inverse = frequencies(replace(rope, divisors=rope.long_divisors) if rope.long(positions) else rope, head_dim)
    high, low = rows(positions)
    if not low:
        return Tables(turned(inverse, range(positions), rope.attention_factor))
    return Tables(turned(inverse, range(0, high * low, low), rope.attention_factor), turned(inverse, range(low)))


def turned(
    inverse: NDArray[np.float32], positions: range, factor: float = 1.0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin of each position times each frequency, times `factor`: the float32 nearest to the exact value."""
    x = np.array(positions, np.float64)[:, None] * inverse.astype(np.float64)[None, :]  # exact below 2**29 positions
    quarter = np.rint(x * (2 / math.pi))
    x = ((x - quarter * PI_2_HEAD) - quarter * PI_2_MIDDLE) - quarter * PI_2_TAIL
    square = x * x
    sine, cosine = x * _horner(square, SIN_TERMS), _horner(square, COS_TERMS)
    turn = quarter.astype(np.int64) & 3
    cos = np.choose(turn, [cosine, -sine, -cosine, sine])
    sin = np.choose(turn, [sine, cosine, -sine, -cosine])
    return (cos * factor).astype(np.float32), (sin * factor).astype(np.float32)


def _horner(x: NDArray[np.float64], terms: tuple[float, ...]) -> NDArray[np.float64]:
    total = np.full_like(x, terms[-1])
    for term in reversed(terms[:-1]):
        total = total * x + term
    return total

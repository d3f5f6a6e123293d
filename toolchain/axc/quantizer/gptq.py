"""GPTQ: levels that preserve a matrix's outputs for observed inputs, not its values.

https://arxiv.org/abs/2210.17323 , with columns in descending order of activation (act-order) and static groups: the
order is not visible in the file. Scales are chosen first, in float16: those with the least squared error, weighted by
the diagonal of the Hessian.

`drift` corrects for the errors of the layers before (GPTAQ, https://arxiv.org/abs/2504.02692): the outputs to preserve
are those for the float model's inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from axc.quantizer.round_to_nearest import LEVELS, SMALLEST

DAMP = 0.01  # of the mean of the diagonal, added to it
DRIFT = 0.5  # share of the drift that is corrected: all of it follows the calibration text too closely
LAZY = 128  # columns between two updates of all that follow
FACTORS = {"INT4": np.linspace(1.05, 0.6, 19), "INT8": np.linspace(1.0, 0.97, 7)}
CHUNK = 1 << 15  # elements of a matrix whose scales are searched at a time: they stay in the cache

Tensor = Any  # torch.Tensor


@dataclass(frozen=True)
class Inputs:
    """Statistics of the inputs of a matrix, shared by all its rows.

    `importance` float32 [in] weighs the error of a column, `order` is that of the columns, `inverse` the factor of the
    Hessian's inverse in it.
    """

    importance: Tensor
    order: Tensor
    inverse: Tensor
    drift: Tensor | None

    @classmethod
    def of(cls, hessian: Tensor, drift: Tensor | None = None) -> Inputs:
        """`hessian` [in, in] is the sum of x xT over the inputs x, `drift` that of (y - x) xT, y the float model's
        inputs. Raises ValueError where the Hessian is not finite.
        """
        diagonal = hessian.diagonal().double()
        if not bool(torch.isfinite(diagonal).all()):
            raise ValueError("the inputs are not finite")
        damp = DAMP * (float(diagonal.mean()) or 1.0)
        order = torch.argsort(diagonal, descending=True, stable=True)
        return cls((diagonal + damp).float(), order, _inverse_factor(hessian, order, damp), drift)

    def quantize(self, weights: Tensor, dtype: str, block: int) -> tuple[Tensor, Tensor]:
        """Levels float32 [out, in] and scales float32 [out, in / block] of weights float32 [out, in]."""
        order, inverse = self.order, self.inverse
        scales = search_scales(weights, self.importance, dtype, block)
        wanted = weights[:, order]
        if self.drift is not None:
            wanted = wanted + DRIFT * ((weights @ self.drift)[:, order] @ inverse.T @ inverse)
        levels = torch.empty_like(weights)
        levels[:, order] = _sweep(wanted.T.contiguous(), inverse, scales[:, order // block].T, *LEVELS[dtype]).T
        return levels, scales


def quantize(
    weights: Tensor, hessian: Tensor, dtype: str, block: int, drift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same for one matrix. Raises ValueError where the Hessian is not finite."""
    return Inputs.of(hessian, drift).quantize(weights, dtype, block)


def _inverse_factor(hessian: Tensor, order: Tensor, damp: float) -> Tensor:
    """The upper triangular U, float32, with UT U the inverse of hessian + damp I, its columns in `order`.

    Of the reversed matrix's Cholesky factor; in place where that works, for this is where most memory is taken.
    """
    backwards = order.flip(0)
    whole = hessian[backwards[:, None], backwards[None]].double()
    whole.diagonal().add_(damp)
    factor = torch.linalg.cholesky(whole)
    del whole
    factor = factor.flip(0, 1)
    inverse = torch.eye(len(hessian), dtype=factor.dtype)
    torch.linalg.solve_triangular(factor, inverse, upper=True, out=inverse)
    del factor
    return inverse.float()


def _sweep(weights: Tensor, inverse: Tensor, scales: Tensor, low: int, high: int) -> Tensor:
    """Rounds column by column, [in, out] here, and spreads the error over the columns behind. Overwrites `weights`.

    Within `LAZY` columns by numpy: the steps are too small for several threads.
    """
    levels = torch.empty_like(weights)
    rounded, factor, steps = levels.numpy(), inverse.numpy(), scales.contiguous().numpy()
    for start in range(0, len(weights), LAZY):
        stop = min(start + LAZY, len(weights))
        block, errors = weights[start:stop].numpy(), np.empty((stop - start, weights.shape[1]), np.float32)
        for at in range(start, stop):
            row, step, error = block[at - start], steps[at], errors[at - start]
            np.clip(np.rint(row / step), low, high, out=rounded[at])
            np.subtract(row, rounded[at] * step, out=error)
            error /= factor[at, at]
            rest = block[at - start + 1 :]
            rest -= factor[at, at + 1 : stop, None] * error
        if stop < len(weights):
            weights[stop:].addmm_(inverse[start:stop, stop:].T, torch.from_numpy(errors), alpha=-1)
    return levels


def search_scales(weights: Tensor, importance: Tensor, dtype: str, block: int) -> Tensor:
    """Scales [out, in / block], float16 values, with the least squared error that `importance` [in] weighs."""
    height = max(CHUNK // weights.shape[1], 1)
    return torch.cat([_search(rows, importance, dtype, block) for rows in weights.split(height)])


def _search(weights: Tensor, importance: Tensor, dtype: str, block: int) -> Tensor:
    low, high = LEVELS[dtype]
    groups = weights.view(len(weights), -1, block)
    importance = importance.view(1, -1, block)
    top, bottom = groups.amax(-1), groups.amin(-1)
    full = torch.where(top >= -bottom, top, bottom) / low if -low > high else torch.maximum(top, -bottom) / high
    best, least = _halved(full), torch.full_like(full, float("inf"))
    for factor in FACTORS[dtype]:
        scale = _halved(full * float(factor))
        difference = torch.clamp(torch.round(groups / scale[..., None]), low, high).mul_(scale[..., None]).sub_(groups)
        error = difference.square_().mul_(importance).sum(-1)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def _halved(scale: Tensor) -> Tensor:
    """Rounded to float16, and never 0."""
    half = scale.clamp(-65504, 65504).half().float()
    smallest = float(SMALLEST["FLOAT16"])
    return torch.where(half == 0, torch.full_like(half, smallest), half)


def dequantize(levels: Tensor, scales: Tensor) -> Tensor:
    """float32 [out, in]"""
    out, columns = levels.shape
    return (levels.view(out, scales.shape[1], -1) * scales[..., None]).view(out, columns)


def as_arrays(levels: Tensor, scales: Tensor) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """As a calibration file holds them."""
    return levels.to(torch.int8).numpy(), scales.half().numpy()

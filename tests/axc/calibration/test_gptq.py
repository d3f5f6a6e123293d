"""GPTQ beside the textbook's loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from axc.quantizer import gptq
from axc.quantizer.round_to_nearest import quantize as round_to_nearest
from tests.axc.calibration.calibrations import Floats


def correlated(rows: int = 24, columns: int = 96, tokens: int = 400) -> tuple[Any, Any]:
    """A matrix and the Hessian of inputs that hang together, some of them large."""
    torch.manual_seed(0)
    x = torch.randn(tokens, columns) @ torch.randn(columns, columns) * (torch.rand(columns) * 3 + 0.1)
    return torch.randn(rows, columns), x.T @ x


def squared(weights: Any, stored: Any, hessian: Any) -> float:
    difference = (weights - stored).double()
    return float(((difference @ hessian.double()) * difference).sum())


def textbook(weights: Floats, hessian: Floats, scales: Floats, block: int) -> Floats:
    """Optimal brain quantisation in a fixed order, row by row in float64: https://arxiv.org/abs/2208.11580 , (3)."""
    count = weights.shape[1]
    damped = hessian.astype(np.float64) + gptq.DAMP * np.diag(hessian).mean() * np.eye(count)
    order = np.argsort(-np.diag(hessian), kind="stable")
    w, levels = weights.astype(np.float64), np.zeros_like(weights)
    left = list(order)
    for column in order:
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        scale = scales[:, column // block]
        levels[:, column] = np.clip(np.rint(w[:, column] / scale), -8, 7)
        error = (w[:, column] - levels[:, column] * scale) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0]
        left.remove(column)
    return levels


@pytest.mark.parametrize("lazy", [gptq.LAZY, 40])
def test_levels_are_those_of_the_textbook(lazy: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the columns are rounded in several blocks, the last of them shorter."""
    monkeypatch.setattr(gptq, "LAZY", lazy)
    matrix, hessian = correlated()
    levels, scales = gptq.quantize(matrix, hessian, "INT4", 32)
    expected = textbook(matrix.numpy(), hessian.numpy(), scales.numpy(), 32)
    assert (levels.numpy() == expected).mean() > 0.995  # float32 beside float64: a value between two levels may differ
    assert np.array_equal(scales.numpy(), scales.half().float().numpy())


@pytest.mark.parametrize(("dtype", "block"), [("INT4", 32), ("INT8", 32)])
def test_outputs_are_nearer_than_rounded_to_nearest(dtype: str, block: int) -> None:
    matrix, hessian = correlated()
    levels, scales = gptq.quantize(matrix, hessian, dtype, block)
    nearest, steps, *_ = round_to_nearest(matrix.numpy().reshape(-1, block), dtype)
    plain = torch.from_numpy(nearest * steps[:, None]).reshape(matrix.shape).float()
    ours = squared(matrix, gptq.dequantize(levels, scales), hessian)
    assert ours < 0.6 * squared(matrix, plain, hessian)


def test_the_order_of_columns_within_a_block_does_not_matter() -> None:
    matrix, hessian = correlated()
    order = torch.cat([torch.randperm(32) + start for start in range(0, 96, 32)])
    levels, scales = gptq.quantize(matrix, hessian, "INT4", 32)
    other, others = gptq.quantize(matrix[:, order], hessian[order][:, order], "INT4", 32)
    assert torch.equal(scales, others)
    assert float((levels[:, order] == other).float().mean()) > 0.995


def test_drift_of_the_inputs_is_corrected() -> None:
    """The outputs that count are those for the float model's inputs y, and the layer gets x."""
    torch.manual_seed(1)
    y = torch.randn(500, 64) @ torch.randn(64, 64)
    x = y + 0.3 * torch.randn(500, 64) @ torch.randn(64, 64)
    matrix = torch.randn(32, 64)

    def error(drift: Any) -> float:
        levels, scales = gptq.quantize(matrix, x.T @ x, "INT4", 32, drift)
        return float((y @ matrix.T - x @ gptq.dequantize(levels, scales).T).square().sum())

    assert error((y - x).T @ x) < 0.9 * error(None)


def test_inputs_that_are_always_zero_or_not_finite() -> None:
    matrix, hessian = correlated()
    hessian[5], hessian[:, 5] = 0, 0
    levels, scales = gptq.quantize(matrix, hessian, "INT4", 32)
    assert bool(torch.isfinite(gptq.dequantize(levels, scales)).all())
    levels, scales = gptq.quantize(matrix, torch.zeros(96, 96), "INT4", 32)
    assert float((gptq.dequantize(levels, scales) - matrix).abs().max()) < 1
    hessian[7, 7] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        gptq.quantize(matrix, hessian, "INT4", 32)

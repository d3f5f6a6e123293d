"""Accuracy relative to the checkpoint, measured on the board with the board's engine."""

from __future__ import annotations

from typing import Any

from ci.nightly import metrics
from tests.hil.on_board import OnBoard


def test_accuracy_is_within_its_gates(on_board: OnBoard, expect: Any) -> None:
    evaluation, _ = on_board.axrun("eval")
    on_board.seen |= {"evaluation": evaluation, "reference_sha256": evaluation.get("reference_sha256", "")}
    expect(metrics.accuracy(evaluation), str(evaluation.get("maker")))

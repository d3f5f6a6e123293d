"""The board computes the same bits as this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from axrun.errors import CheckFailed
from axrun.format.bundle import Bundle
from axrun.load import Loading
from axrun.measure.trace import trace
from ci.nightly import one_answer
from tests.hil.on_board import OnBoard


def test_logits_equal_those_of_this_machine(on_board: OnBoard, request: pytest.FixtureRequest) -> None:
    path, board = request.config.option.hil_bundle, on_board.board
    if path is None:
        pytest.fail("no bundle was named: --hil-bundle DIR, this machine's copy of the deployed bundle", pytrace=False)
    told = on_board.seen.get("evaluation") or on_board.axrun("eval")[0]
    if reason := one_answer.incomparable(Bundle.open(path), board.engine):
        on_board.seen["one_answer"] = {"compared": False, "reason": reason}
        return
    expected = one_answer.host_digest(path, str(told.get("manifest_sha256")), board.engine)
    seen = told.get(one_answer.DIGEST)
    on_board.seen["one_answer"] = {"compared": True, "here": expected, "board": seen}
    if seen == expected:
        return

    def here(part: str) -> Mapping[str, Any]:
        return trace(path, part, loading=Loading(engine=board.engine)).json()

    def there(part: str) -> Mapping[str, Any]:
        return on_board.axrun("trace", *(["--rows", part] if part else []))[0]

    place = one_answer.first_difference(here, there) or "not in layers that run one by one, only in whole chunks"
    raise CheckFailed(f"{board.name} computes other bits than this machine: {place}")

"""No board is named in the environment of these tests."""

from __future__ import annotations

import pytest

from ci.nightly import matrix


@pytest.fixture(autouse=True)
def no_board_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*matrix.OF_ONE, "LG_COORDINATOR"):
        monkeypatch.delenv(name, raising=False)

"""The folder of a night: one night at a time, named by its start time."""

from __future__ import annotations

from pathlib import Path

import pytest

from axrun.errors import BadInput
from ci.nightly import run_folder


def test_two_nights_do_not_share_a_folder_of_bundles(tmp_path: Path) -> None:
    base = tmp_path / "nightly" / "virtual"
    with run_folder.claimed(base):
        with pytest.raises(BadInput, match=r"virtual is in use by a night \(pid \d+\): .* would mix"):
            run_folder.claimed(base).__enter__()
        with run_folder.claimed(base.with_name("ax650")):
            pass
    with run_folder.claimed(base):
        run_folder.new(base / "nights" / "tiny-qwen2", "2026-11-03T02:00:00Z", 3)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot write in"):
        run_folder.claimed(tmp_path / "file" / "virtual").__enter__()

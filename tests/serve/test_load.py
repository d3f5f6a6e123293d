"""32 streaming clients, a third of which disconnect: answers are right, and no files or memory leak."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serve import load
from tests.serve.server import Start


@pytest.mark.parametrize("seconds", [6.0, pytest.param(60.0, marks=pytest.mark.system)])
def test_answers_under_load_equal_those_of_an_idle_server(bundle_s8: Path, start: Start, seconds: float) -> None:
    server = start(bundle_s8).ready()
    load.run(server, 32, 2.0)  # warm-up, so that memory use is steady
    server.idle()
    rss, files = server.rss(), open_files(server.process.pid)
    figures = load.run(server, 32, seconds, whole=100, cut=50)
    metrics = server.idle()
    assert figures.wrong == []
    assert metrics["axrun_cancelled_total"] > 0.2 * figures.cut, (
        "very short answers may be finished before the disconnect"
    )
    assert server.rss() < rss + (8 << 20)
    server.until(lambda: open_files(server.process.pid) <= files)
    assert not [line for line in server.lines if "Traceback" in line]
    assert server.stop() == 0


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))

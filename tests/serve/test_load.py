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


def test_many_slots_share_little_memory(bundle_s8: Path, start: Start) -> None:
    server = start(bundle_s8, "--slots", 32, "--kv-cache-mb", 1).ready()
    figures = load.run(server, 32, 1.0, whole=60, cut=20)
    metrics, health = server.idle(), server.client.get("/health").json()
    assert figures.wrong == []
    assert health["kv_blocks"] == metrics["axrun_kv_blocks"] < 32 * 4
    assert 0 < health["kv_blocks_used"] <= health["kv_blocks"]
    assert metrics['axrun_tokens_total{kind="prompt_reused"}'] > metrics['axrun_tokens_total{kind="prompt"}'] / 2
    assert server.stop() == 0


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))

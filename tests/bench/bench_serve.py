"""The server under load, and the cost of a second turn. `make bench ARGS='-k serve'`."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from tests.bench.tables import record
from tests.serve import load
from tests.serve.server import Server

CLIENTS, SECONDS = 32, 60.0


def test_32_clients_for_a_minute(benchmark: BenchmarkFixture, bundle_s8: Path) -> None:
    """A third of them disconnect in the middle; the mean time is that of a complete answer."""
    server = Server(bundle_s8).ready()
    try:
        load.run(server, CLIENTS, 3.0)
        server.idle()
        rss = [server.rss()]
        figures: Any = benchmark.pedantic(load.run, (server, CLIENTS, SECONDS), rounds=1)
        metrics = server.idle()
        rss.append(server.rss())
    finally:
        assert server.stop() == 0
    assert figures.wrong == []
    assert rss[1] - rss[0] < 8 << 20
    written = metrics['axrun_tokens_total{kind="written"}']
    benchmark.extra_info |= {
        **figures.summary(),
        "answers": len(figures.whole),
        "cut": figures.cut,
        "tokens_written_per_s": round(written / (SECONDS + 3), 1),
        "rss_mb_before_after": [round(value / 1e6, 1) for value in rss],
    }
    record(
        benchmark,
        "serve-load",
        f"Server: {CLIENTS} clients for {SECONDS:.0f} s, a third hang up",
        ("", "value"),
        [(name, str(value)) for name, value in benchmark.extra_info.items()],
    )


@pytest.mark.parametrize("new", [4, 24, 60])
@pytest.mark.parametrize("history", [0, 70, 170])
def test_time_to_first_token_behind_a_history(
    benchmark: BenchmarkFixture, bundle_s8: Path, history: int, new: int
) -> None:
    """A prompt of `new` tokens after `history` tokens cached in the slot."""
    server = Server(bundle_s8, "--slots", 1).ready()
    ids = [index % 200 + 10 for index in range(history)]

    def ask(last: int) -> float:
        started = time.perf_counter()
        server.complete(ids + [(last + index) % 200 + 10 for index in range(new)], max_tokens=1)
        return time.perf_counter() - started

    try:
        seconds = [ask(last) for last in range(0, 100, 5)]
        benchmark.pedantic(ask, (150,), rounds=1)
    finally:
        assert server.stop() == 0
    benchmark.extra_info["median_ms"] = round(1e3 * median(seconds[1:]), 2)
    record(
        benchmark,
        "serve-ttft",
        "Server: time to first token behind a cached history, tiny-qwen2",
        ("history + new tokens", "ms"),
        [(f"{history} + {new}", str(benchmark.extra_info["median_ms"]))],
        unit="ms",
    )

"""Speed of the board by its own clock; pytest-benchmark gets the board's times, without the network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from axrun.errors import BadInput
from ci.nightly import metrics
from tests.hil.on_board import OnBoard

LENGTHS, DEPTHS = (",".join(map(str, counts)) for counts in (metrics.LENGTHS, metrics.DEPTHS))
FLAGS = ("--prompt-lengths", LENGTHS, "--depths", DEPTHS, "--tokens", "8", "--repeat", "7")
YARDSTICK = Path(__file__).with_name("yardstick.py")


class BoardClock:
    """A timer for pytest-benchmark that replays times measured on the board."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = BoardClock()


@pytest.fixture(scope="module")
def bench(on_board: OnBoard) -> dict[str, Any]:
    """`axrun bench`, between two yardsticks."""
    before = measure_yardstick(on_board)
    report, on_board.seen["cpu_seconds"] = on_board.axrun("bench", *FLAGS, *threads(on_board))
    on_board.seen |= {"bench": report, "engine": report.get("engine", ""), "machine": report.get("machine", {})}
    on_board.seen["yardstick"] = (before + measure_yardstick(on_board)) / 2
    return report


def threads(on_board: OnBoard) -> tuple[str, ...]:
    """One thread on an emulated board: synchronising two threads would measure the load of the host."""
    return ("--threads", "1") if on_board.board.emulated else ()


def measure_yardstick(on_board: OnBoard) -> float:
    """The yardstick's processor time in seconds."""
    said = on_board.python("the yardstick", YARDSTICK.read_text("utf-8"))
    try:
        return float(said)
    except ValueError:
        raise BadInput(f"the yardstick on {on_board.board.name} says {said[:80]!a}, expected seconds") from None


def test_speed_is_within_its_gates(on_board: OnBoard, bench: dict[str, Any], expect: Any) -> None:
    seen = on_board.seen
    expect(metrics.speed(bench, seen["cpu_seconds"], seen["yardstick"]), str(bench.get("maker")))


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(
    ("group", "key", "place"),
    [("prompts", "ttft_seconds", 0), ("prompts", "ttft_seconds", 1), ("decode", "token_seconds", 0)],
    ids=["ttft_16", "ttft_128", "decode_128"],
)
def test_times_for_pytest_benchmark(
    group: str, key: str, place: int, bench: dict[str, Any], benchmark: BenchmarkFixture, on_board: OnBoard
) -> None:
    """Seconds for the first token, or per decoded token; tokens per second are in extra_info."""
    entry = bench[group][place]
    runs = list(times(entry[key]["runs"]))
    told: Iterator[float] = iter(runs)

    def run() -> None:
        CLOCK.now += next(told)

    measured = {"tokens_per_second": entry["tokens_per_second"], "engine": str(bench["engine"])[:80]}
    benchmark.extra_info |= {**measured, **{key: value for key, value in on_board.seen["evidence"].items() if value}}
    benchmark.pedantic(run, rounds=len(runs))


def times(runs: Iterable[object]) -> Iterator[float]:
    for run in runs:
        assert isinstance(run, float)
        assert 0 < run < math.inf
        yield run

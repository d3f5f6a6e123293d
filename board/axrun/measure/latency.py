"""Latency of one axmodel per shape group."""

from __future__ import annotations

import os
import statistics
import time
from typing import NamedTuple

import numpy as np

from axrun.errors import BadInput, CheckFailed, NotFinite
from axrun.format.dtypes import FLOATS, from_float32
from axrun.session import Session, open_session


class Latency(NamedTuple):
    """Latencies of `repeat` runs of a group in milliseconds."""

    group: int
    tokens: int
    history: int
    repeat: int
    min_ms: float
    max_ms: float
    avg_ms: float
    median_ms: float


def measure(
    path: str | os.PathLike[str],
    group: int | None = None,
    warmup: int = 3,
    repeat: int = 20,
    engine: str = "ax",
    threads: int | None = None,
) -> list[Latency]:
    """Times one shape group of an axmodel, or all, at its full shape.

    Raises BadInput for invalid arguments, CheckFailed if an output is not finite.
    """
    if repeat < 1 or warmup < 0:
        raise BadInput(f"--repeat is {repeat} and --warmup {warmup}; expected at least 1 and 0")
    session = open_session(path, engine, threads)
    chosen = [entry.index for entry in session.groups if group in (None, entry.index)]
    if not chosen:
        raise BadInput(f"{path} has no group {group}; it has 0 to {len(session.groups) - 1}")
    try:
        return [_measure(session, index, warmup, repeat) for index in chosen]
    except NotFinite as error:
        raise CheckFailed(
            f"{path}: {error.tensor} is not finite in row {error.row} for inputs around 1: it overflows or is damaged\n"
            "Build with --hidden_state_type bf16 or fp32, or copy the file again."
        ) from None


def _measure(session: Session, index: int, warmup: int, repeat: int) -> Latency:
    group = session.groups[index]
    random = np.random.default_rng(0)
    arrays = {}
    for info in group.inputs + group.outputs:
        array = arrays[info.name] = session.allocate(info)
        if info in group.inputs and info.name != "mask" and info.dtype in FLOATS.values():
            array[...] = from_float32(random.standard_normal(array.shape, np.float32), info.dtype)
    if "indices" in arrays and group.inputs[0].name != "input":
        arrays["indices"][0] = np.arange(group.history, group.history + group.tokens)
    binding = session.bind(index, arrays)
    for _ in range(warmup):
        binding.run()
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        binding.run()
        times.append(1e3 * (time.perf_counter() - started))
    figures = (min(times), max(times), statistics.fmean(times), statistics.median(times))
    return Latency(index, group.tokens, group.history, repeat, *(round(figure, 4) for figure in figures))

"""The figures of a night: name, label, unit, direction, and how to read them from the board's reports.

They come from `axrun eval --json` and `axrun bench --json` on the board. Its output is not trusted: a missing or
non-finite number is an error here, not a gap in a plot later.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from axrun.errors import BadInput

Figures = Mapping[str, float]

MOST = 1e15  # of any figure: bytes of memory are the largest


@dataclass(frozen=True)
class Metric:
    """One figure. `{n}` in `label` stands for the number in `name`, usually a count of tokens.

    `higher`: higher is better. `timed`: it depends on the clock of the machine it runs on. `floor` is the least
    tolerance of a recorded gate, as a share of the expected value, because a few nights show less than the full
    run-to-run variation. `gated` False: it has a fixed limit where it is measured and gets no gate.
    """

    name: str
    label: str
    unit: str
    higher: bool
    floor: float
    timed: bool = False
    gated: bool = True

    def text(self, value: float, more: int = 0) -> str:
        """A value with its unit as text, with `more` digits than usual."""
        return f"{number(value, more)} {self.unit}".strip()


# In the order of the reports: accuracy before speed.
METRICS = (
    Metric("mean_kld", "mean KL divergence from the checkpoint", "nats", False, 0.05),
    Metric("kld_99_9", "99.9 % KL divergence", "nats", False, 0.1),
    Metric("top1_agreement", "same top token as the checkpoint", "%", True, 0.002),
    Metric("perplexity_ratio", "perplexity over the checkpoint's", "x", False, 0.001),
    Metric("greedy_same", "greedy tokens before one differs", "tokens", True, 0.02),
    Metric("cache_kld", "KL divergence, worst path through the KV cache", "nats", False, 0.5),
    Metric("cache_difference", "largest logit difference between cache paths", "", False, 1.0),
    Metric("ttft_n", "first token of a prompt of {n}", "ms", False, 0.05, timed=True),
    Metric("turn_n", "first token of a turn behind {n}", "ms", False, 0.05, timed=True),
    Metric("decode_n", "decode behind {n}", "token/s", True, 0.05, timed=True),
    Metric("work", "processor time of the bench", "yardsticks", False, 0.6),
    Metric("engine_instructions", "instructions of the engine, a fixed answer", "M", False, 0.02),
    Metric("runner_instructions_n", "instructions of the runner, Python {n}", "M", False, 0.02),
    Metric("load", "load", "s", False, 0.2, timed=True),
    Metric("peak_memory", "peak memory", "MB", False, 0.2),
    Metric("soak_ttft_n", "soak: first token, fastest {n} %", "ms", False, 0.2, timed=True),
    Metric("soak_answer_n", "soak: whole answer, fastest {n} %", "ms", False, 0.2, timed=True),
    Metric("soak_memory", "soak: memory growth of a server", "MB", False, 0.2, gated=False),
    Metric("soak_differing", "soak: answers changed by cache reuse", "%", False, 0.2, gated=False),
)
ORDER = {metric.name: place for place, metric in enumerate(METRICS)}
ACCURACY = ("mean_kld", "kld_99_9", "top1_agreement", "perplexity_ratio", "greedy_same")
CACHE = ("cache_kld", "cache_difference")
QUALITY = (*ACCURACY, *CACHE)
WAYS = ("fresh", "decode", "chunks", "rollback")  # paths through the KV cache: tests/hil/cache_paths.py


LENGTHS, DEPTHS = (16, 128), (128,)  # of the bench: prompt lengths, and tokens already in the cache
SOAK = (
    *(f"soak_{what}_{share}" for what in ("ttft", "answer") for share in (50, 99)),
    *("soak_memory", "soak_differing"),
)
# The figures of a night on any board.
MEASURED = (
    *QUALITY,
    *(f"ttft_{length}" for length in LENGTHS),
    *(f"{kind}_{depth}" for kind in ("turn", "decode") for depth in DEPTHS),
    *("work", "load", "peak_memory"),
    *SOAK,
)
COUNTED = (
    "engine_instructions",
    "runner_instructions",
)  # for an emulated board, counted on the host: ci/nightly/instructions.py


def find(name: str) -> Metric:
    """The metric of a figure such as decode_128, its number filled in. Raises BadInput for an unknown one."""
    found = re.fullmatch(r"([a-z_]+)_(\d{1,7})", name)
    family = f"{found[1]}_n" if found else name
    place = ORDER.get(family if family in ORDER else name)
    if place is None or name.endswith("_n"):
        near = difflib.get_close_matches(name, [*MEASURED, *ORDER], 1)
        meant = f"is {near[0]} meant?" if near else f"there are {', '.join(metric.name for metric in METRICS)}"
        raise BadInput(f"no figure is named {name!a:.40}: {meant}")
    metric = METRICS[place]
    label = metric.label.format(n=found[2]) if found else metric.label
    return replace(metric, name=name, label=label)


def is_figure(value: object) -> bool:
    """Whether a value can be a figure: a number within MOST."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MOST  # not NaN


def figures(found: object) -> dict[str, float]:
    """The valid figures in a decoded JSON object; everything else is skipped."""
    kept = {}
    for name, value in found.items() if isinstance(found, dict) else ():
        with contextlib.suppress(BadInput):
            if is_figure(value) and find(name):
                kept[str(name)] = float(value)
    return kept


def rank(name: str) -> tuple[int, int]:
    """Sort key: the order of METRICS, within a family by number."""
    digits = re.search(r"_(\d+)$", name)
    return ORDER.get(name, ORDER.get(re.sub(r"_\d+$", "_n", name), len(ORDER))), int(digits[1]) if digits else 0


def accuracy(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """The figures of an `axrun eval --json`. Raises BadInput for a missing or invalid number."""
    where = "axrun eval --json"
    figures = {name: _finite(evaluation, name, where) for name in ACCURACY if evaluation.get(name) is not None}
    for name in ACCURACY[:-1]:  # the last one is optional: a reference may have no greedy answers
        _finite(evaluation, name, where)
    return {name: 100 * value if name == "top1_agreement" else value for name, value in figures.items()}


def cache(ways: Mapping[str, Any]) -> dict[str, float]:
    """The figures of tests/hil/cache_paths.py: the worst of its paths. Raises BadInput."""
    where = "the paths through the cache"
    for way in WAYS:
        if not isinstance(ways, Mapping) or not isinstance(ways.get(way), Mapping):
            raise BadInput(f"{where} have no {way!r}: expected {', '.join(WAYS)}")
    return {
        "cache_kld": max(_finite(ways[way], "mean_kld", where) for way in WAYS),
        "cache_difference": max(_finite(ways[way], "difference", where) for way in WAYS),
    }


def speed(report: Mapping[str, Any], cpu_seconds: float, yardstick: float) -> dict[str, float]:
    """The figures of an `axrun bench --json`, and its processor time in yardsticks.

    `yardstick` is the processor time in seconds of a fixed piece of arithmetic on the same board. In this unit, `work`
    depends neither on the board's clock rate nor on the load of an emulating host. Raises BadInput.
    """
    where = "axrun bench --json"
    for what, seconds in (("yardstick", yardstick), ("bench", cpu_seconds)):
        if not 0 < seconds < MOST:
            raise BadInput(f"the {what} took {seconds!r} s of processor time, expected a time")
    figures = {"load": _finite(report, "load_seconds", where), "work": cpu_seconds / yardstick}
    if report.get("peak_rss") is not None:
        figures["peak_memory"] = _finite(report, "peak_rss", where) / 1e6
    for group, key, name, scale in TIMES:
        for entry in _entries(report, group, where):
            count = int(_finite(entry, "tokens" if group == "prompts" else "depth", where))
            spread = entry.get(key)
            if not isinstance(spread, dict):
                raise BadInput(f"{where} has {spread!a:.40} for {group} {key}, expected its spread")
            figures[f"{name}_{count}"] = scale(_positive(spread, "median", where))
    return dict(sorted(figures.items(), key=lambda item: rank(item[0])))


def number(value: float, more: int = 0) -> str:
    """Four significant digits (five near 1, for ratios) plus `more`; scientific notation only where it is shorter."""
    if value != 0 and not 1e-3 <= abs(value) < 1e7:
        return f"{value:.{2 + more}e}"
    if abs(value) >= 1000:
        return f"{value:.{more}f}"
    return f"{value:.{5 + more}g}" if 0.9 < abs(value) < 1.1 else f"{value:.{4 + more}g}"


Scale = Callable[[float], float]

# (list in the report, key of its spread, name of the figure, seconds -> unit)
TIMES: tuple[tuple[str, str, str, Scale], ...] = (
    ("prompts", "ttft_seconds", "ttft", lambda seconds: 1e3 * seconds),
    ("turns", "ttft_seconds", "turn", lambda seconds: 1e3 * seconds),
    ("decode", "token_seconds", "decode", lambda seconds: 1 / seconds),
)


def _entries(report: Mapping[str, Any], group: str, where: str) -> Iterator[Mapping[str, Any]]:
    entries = report.get(group)
    if not isinstance(entries, list) or len(entries) > 100 or not all(isinstance(entry, dict) for entry in entries):
        raise BadInput(f"{where} has {entries!a:.40} for {group}, expected a list of measurements")
    yield from entries


def _positive(table: Mapping[str, Any], key: str, where: str) -> float:
    value = _finite(table, key, where)
    if value <= 0:
        raise BadInput(f"{where} has {key} {value!r}, expected a time above 0")
    return value


def _finite(table: Mapping[str, Any], key: str, where: str) -> float:
    value = table.get(key)
    if value is None or not is_figure(value):
        raise BadInput(f"{where} has {value!a:.40} for {key}, expected a number")
    return float(value)

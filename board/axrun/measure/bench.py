"""axrun bench: measures the speed of a bundle, comparable between runs.

The prompt tokens are spread over the vocabulary, since the speed does not depend on their meaning. As in llama-bench,
tokenisation and output are not timed. Greedy sampling is included, as it is part of every decode step.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import abc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from axrun import VERSION, machine
from axrun.errors import BadInput
from axrun.format.bundle import MANIFEST, sha256
from axrun.generate import Stats, generate
from axrun.load import DEFAULTS, Loading, Say
from axrun.machine import Machine
from axrun.model import Model
from axrun.sampling import Sampling
from axrun.sequence import Sequence
from axrun.session import engine_version

LENGTHS = (16, 128, 512)  # default prompt lengths and depths, as far as they fit the context
TURN = 16  # tokens of a new turn of a conversation
STRIDE = 7919  # step between successive token ids of the prompts; a prime


@dataclass(frozen=True)
class Options:
    """`prompts`: prompt lengths; `depths`: tokens in the KV cache before decoding; None: those of LENGTHS that fit.

    `tokens` are decoded in each of `repeat` timed runs, after `warmup` untimed ones.
    """

    prompts: tuple[int, ...] | None = None
    depths: tuple[int, ...] | None = None
    tokens: int = 32
    warmup: int = 1
    repeat: int = 5

    def __post_init__(self) -> None:
        """Raises BadInput for a number out of range."""
        if self.repeat < 1 or self.warmup < 0 or self.tokens < 2:
            raise BadInput(
                f"--repeat is {self.repeat}, --warmup {self.warmup} and --tokens {self.tokens}; "
                "expected at least 1, 0 and 2"
            )
        for flag, values, least in (("--prompt-lengths", self.prompts, 1), ("--depths", self.depths, 0)):
            if values is not None and (not values or min(values) < least):
                raise BadInput(f"{flag} is {','.join(map(str, values))}; expected numbers from {least} on: 16,128")


@dataclass(frozen=True)
class Spread:
    """The seconds of every run."""

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    @property
    def least(self) -> float:
        return min(self.runs)

    @property
    def most(self) -> float:
        return max(self.runs)

    def json(self) -> dict[str, Any]:
        figures = {"median": self.median, "min": self.least, "max": self.most}
        return {**{key: _round(value) for key, value in figures.items()}, "runs": [_round(run) for run in self.runs]}


@dataclass(frozen=True)
class Prefill:
    """Time to first token for `tokens` new tokens after `depth` cached ones: a prompt, or a further turn."""

    tokens: int
    depth: int
    ttft: Spread

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.ttft.median

    def json(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "depth": self.depth,
            "ttft_seconds": self.ttft.json(),
            "tokens_per_second": _round(self.rate),
        }


@dataclass(frozen=True)
class Decode:
    """Seconds per token, over `tokens` consecutive tokens after `depth` cached ones."""

    tokens: int
    depth: int
    token: Spread

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return 1 / self.token.median

    def json(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "depth": self.depth,
            "token_seconds": self.token.json(),
            "tokens_per_second": _round(self.rate),
        }


@dataclass(frozen=True)
class Report:
    """The results. `load_seconds`: time to load the model; `peak_rss`: peak memory of the process in bytes."""

    bundle: str
    manifest_sha256: str
    maker: str
    compiler: str
    weight_type: str
    engine: str
    threads: int
    axrun: str
    machine: Machine
    warmup: int
    load_seconds: float
    peak_rss: int | None
    prompts: tuple[Prefill, ...]
    turns: tuple[Prefill, ...]
    decode: tuple[Decode, ...]

    def json(self) -> dict[str, Any]:
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        measured = {name: [entry.json() for entry in plain[name]] for name in ("prompts", "turns", "decode")}
        about = {"machine": dataclasses.asdict(self.machine), "load_seconds": _round(self.load_seconds)}
        return {**plain, **about, **measured}

    def rows(self) -> Iterator[tuple[str, str, str, str]]:
        """(test, milliseconds, their spread, tokens a second)."""
        for what, entries in (("prompt", self.prompts), ("turn", self.turns)):
            for entry in entries:
                test = f"{what} of {entry.tokens}" + (f" at {entry.depth}" if entry.depth else "")
                yield _row(f"{test}, ttft", entry.ttft, entry.rate)
        for decoded in self.decode:
            yield _row(f"decode at {decoded.depth}, a token", decoded.token, decoded.rate)

    def lines(self) -> Iterator[str]:
        """Lines for a terminal."""
        yield from self._about()
        yield f"{'':<26}{'median ms':>12}{'min to max':>22}{'token/s':>12}"
        for test, median, spread, rate in self.rows():
            yield f"{test:<26}{median:>12}{spread:>22}{rate:>12}"

    def markdown(self) -> Iterator[str]:
        """Lines of Markdown."""
        for line in self._about():
            yield f"* {line}"
        yield ""
        yield "| test | median ms | min to max | token/s |"
        yield "|---|--:|--:|--:|"
        for row in self.rows():
            yield f"| {' | '.join(row)} |"

    def _about(self) -> Iterator[str]:
        where = f"{self.machine.board}, {self.machine.cpu}" if self.machine.board else self.machine.cpu
        yield f"{self.bundle} ({self.weight_type}, made by {self.maker}, manifest {self.manifest_sha256[:12]})"
        yield f"compiler: {self.compiler}"
        yield f"{where}: {self.threads} of {self.machine.cpus} threads, engine {self.engine}, axrun {self.axrun}"
        peak = "unknown" if self.peak_rss is None else f"{self.peak_rss / 1e6:.0f} MB"
        yield f"load {self.load_seconds:.2f} s, peak memory {peak}"


def bench(path: Path, options: Options, loading: Loading = DEFAULTS) -> Report:
    """Measures a bundle, and announces each measurement.

    Raises BadInput for an unusable bundle and for lengths beyond its context, CheckFailed if the bundle fails
    verification.
    """
    bundle = loading.open(path)
    prompts = _lengths("--prompt-lengths", options.prompts, bundle.kv_cache_len, bundle.kv_cache_len)
    depths = _lengths("--depths", options.depths, bundle.kv_cache_len - max(options.tokens, TURN), bundle.kv_cache_len)
    started = time.perf_counter()
    model = loading.load(bundle)
    load_seconds = time.perf_counter() - started
    ran = machine.describe()
    measured = list(_measure(model, options, prompts, depths, loading.say))
    return Report(
        bundle=bundle.name,
        manifest_sha256=sha256(path / MANIFEST),
        maker=bundle.maker,
        compiler=bundle.compiler,
        weight_type=bundle.flag("weight_type"),
        engine=f"{loading.engine} {engine_version(loading.engine)}".strip(),
        threads=loading.threads or ran.cpus,
        axrun=VERSION,
        machine=ran,
        warmup=options.warmup,
        load_seconds=load_seconds,
        peak_rss=machine.peak_memory(),
        prompts=tuple(entry for entry in measured if isinstance(entry, Prefill) and not entry.depth),
        turns=tuple(entry for entry in measured if isinstance(entry, Prefill) and entry.depth),
        decode=tuple(entry for entry in measured if isinstance(entry, Decode)),
    )


def _measure(
    model: Model, options: Options, prompts: abc.Sequence[int], depths: abc.Sequence[int], doing: Say
) -> Iterator[Prefill | Decode]:
    sequence = Sequence(model)
    for length in prompts:
        doing(f"prompt of {length}")
        yield Prefill(length, 0, _spread(options, partial(_ttft, sequence, 0, length)))
    for depth in depths:
        sequence.truncate(0)
        if depth:
            doing(f"a cache of {depth}")
            for _ in sequence.extend(_ids(model, depth)):
                pass
            doing(f"turn of {TURN} at {depth}")
            yield Prefill(TURN, depth, _spread(options, partial(_ttft, sequence, depth, TURN)))
        doing(f"decode at {depth}")
        yield Decode(options.tokens, depth, _spread(options, partial(_per_token, sequence, depth, options.tokens)))


def _ttft(sequence: Sequence, depth: int, tokens: int) -> float:
    """Seconds to prefill `tokens` after `depth` cached ones, and to generate one token."""
    sequence.truncate(depth)
    return next(generate(sequence, _ids(sequence.model, depth + tokens), Sampling())).seconds


def _per_token(sequence: Sequence, depth: int, tokens: int) -> float:
    """Seconds per token: the mean over `tokens` generated tokens after `depth` cached ones."""
    sequence.truncate(depth)
    stats = Stats()
    for _ in generate(sequence, _ids(sequence.model, depth + 1), Sampling(), tokens, stats=stats):
        pass
    return (stats.ttft_seconds + stats.decode_seconds) / tokens


def _spread(options: Options, run: Callable[[], float]) -> Spread:
    for _ in range(options.warmup):
        run()
    return Spread(tuple(run() for _ in range(options.repeat)))


def _ids(model: Model, count: int) -> list[int]:
    return [(STRIDE * position + 1) % model.post.vocab_size for position in range(count)]


def _lengths(flag: str, asked: tuple[int, ...] | None, most: int, context: int) -> tuple[int, ...]:
    """The given lengths, or those of LENGTHS that fit. Raises BadInput for a length that does not fit."""
    if asked is None:
        return tuple(length for length in LENGTHS if length <= most)
    if max(asked) > most:
        raise BadInput(f"{flag} has {max(asked)}, the bundle's context is {context}: expected at most {most}")
    return asked


def _row(test: str, spread: Spread, rate: float) -> tuple[str, str, str, str]:
    return test, f"{1e3 * spread.median:.2f}", f"{1e3 * spread.least:.2f} to {1e3 * spread.most:.2f}", f"{rate:.1f}"


def _round(value: float) -> float:
    return float(f"{value:.6g}")

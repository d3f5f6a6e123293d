"""Metrics for Prometheus, served at /metrics: https://prometheus.io/docs/practices/naming"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from axrun.serve.writer import Piece

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
GAUGES = {
    "slots": ("axrun_slots", "K/V slots."),
    "busy": ("axrun_slots_busy", "K/V slots in use."),
    "waiting": ("axrun_requests_waiting", "Requests in the queue."),
    "kv_blocks": ("axrun_kv_blocks", "Blocks of keys and values; 0: each slot has memory of its own."),
    "kv_blocks_used": ("axrun_kv_blocks_used", "Blocks in use, also by idle slots."),
    "kv_blocks_shared": ("axrun_kv_blocks_shared", "Blocks of prefixes that several slots hold."),
}

Figures = Callable[[], Mapping[str, int]]


class ServerMetrics:
    """The metrics of one server. If it has several models, those of a model have the label `model`."""

    def __init__(self, models: Sequence[str]) -> None:
        registry = self._registry = CollectorRegistry()
        names = self._names = ["model"] if len(models) > 1 else []
        self._requests = Counter("axrun_requests", "Requests answered.", ["path", "status"], registry=registry)
        self.cancelled = Counter("axrun_cancelled", "Requests whose client disconnected.", names, registry=registry)
        what = "Answers whose keys and values were dropped for others, and computed again."
        self.suspended = Counter("axrun_suspended", what, names, registry=registry)
        what = "Time to answer a request completely."
        self.seconds = Histogram("axrun_request_seconds", what, names, buckets=SECONDS, registry=registry)
        what = "Time to first token."
        self.ttft = Histogram("axrun_first_token_seconds", what, names, buckets=SECONDS, registry=registry)
        self.tokens = Counter("axrun_tokens", "Tokens, by kind.", [*names, "kind"], registry=registry)
        what = "Time spent in engine steps, by phase."
        self.steps = Counter("axrun_step_seconds", what, [*names, "phase"], registry=registry)
        info = Gauge("axrun_model_info", "The served model.", ["model"], registry=registry)
        for model in models:
            info.labels(model).set(1)
        self.figures: dict[str, Figures] = {}
        registry.register(_Figures(names, self.figures))
        ProcessCollector(registry=registry)

    def labels(self, metric: Any, model: str, *values: str) -> Any:
        """A metric of one model."""
        given = [*([model] if self._names else []), *values]
        return metric.labels(*given) if given else metric

    def text(self) -> bytes:
        """https://prometheus.io/docs/instrumenting/exposition_formats"""
        return generate_latest(self._registry)

    def request(self, path: str, status: int) -> None:
        """`status` 0: the client disconnected before the response began."""
        self._requests.labels(path, str(status)).inc()


class Metrics:
    """The metrics of one model of a server."""

    def __init__(self, server: ServerMetrics, model: str) -> None:
        self._server, self._model = server, model
        self._cancelled, self._suspended, self._seconds, self._ttft = (
            server.labels(metric, model) for metric in (server.cancelled, server.suspended, server.seconds, server.ttft)
        )
        kinds = ("prompt", "prompt_reused", "written", "guessed", "accepted")
        self._prompt, self._reused, self._written, self._guessed, self._accepted = (
            server.labels(server.tokens, model, kind) for kind in kinds
        )
        self._prefill, self._decode = (server.labels(server.steps, model, phase) for phase in ("prefill", "decode"))

    def watch(self, figures: Figures) -> None:
        """`figures` is called on every scrape."""
        self._server.figures[self._model] = figures

    def forget(self) -> None:
        """Ends `watch`."""
        self._server.figures.pop(self._model, None)

    def answered(self, seconds: float) -> None:
        """Records a complete answer; `seconds` from the request to the last byte."""
        self._seconds.observe(seconds)

    def cancelled(self) -> None:
        self._cancelled.inc()

    def suspended(self) -> None:
        self._suspended.inc()

    def first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def run(self, seconds: float, steps: int, read: int) -> None:
        """Records a run for the next tokens of `steps` answers and `read` rows of prompts, which share its time."""
        self._prefill.inc(seconds * read / (steps + read))
        self._decode.inc(seconds * steps / (steps + read))

    def choice(self, piece: Piece) -> None:
        """Counts the tokens of a finished choice; `piece` is its last one."""
        self._prompt.inc(piece.prompt)
        self._reused.inc(piece.reused)
        self._written.inc(piece.written)
        self._guessed.inc(piece.guessed)
        self._accepted.inc(piece.accepted)


class _Figures(Collector):
    def __init__(self, names: Sequence[str], figures: Mapping[str, Figures]) -> None:
        self._names, self._figures = names, figures

    def collect(self) -> Iterable[Metric]:
        values = {model: figures() for model, figures in list(self._figures.items())}
        if not values:
            return
        for figure, (name, text) in GAUGES.items():
            family = GaugeMetricFamily(name, text, labels=self._names)
            for model, found in values.items():
                family.add_metric([model] if self._names else [], found[figure])
            yield family

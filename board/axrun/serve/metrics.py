"""Metrics for Prometheus, served at /metrics: https://prometheus.io/docs/practices/naming"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from axrun.serve.writer import Piece

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
GAUGES = {
    "slots": ("axrun_slots", "K/V slots."),
    "busy": ("axrun_slots_busy", "K/V slots in use."),
    "waiting": ("axrun_requests_waiting", "Requests in the queue."),
}


class Metrics:
    """The metrics of one server."""

    def __init__(self, model: str) -> None:
        registry = self._registry = CollectorRegistry()
        self._requests = Counter("axrun_requests", "Requests answered.", ["path", "status"], registry=registry)
        self._cancelled = Counter("axrun_cancelled", "Requests whose client disconnected.", registry=registry)
        self._seconds = Histogram(
            "axrun_request_seconds", "Time to answer a request completely.", buckets=SECONDS, registry=registry
        )
        self._ttft = Histogram("axrun_first_token_seconds", "Time to first token.", buckets=SECONDS, registry=registry)
        tokens = Counter("axrun_tokens", "Tokens, by kind.", ["kind"], registry=registry)
        self._prompt, self._reused, self._written = map(tokens.labels, ("prompt", "prompt_reused", "written"))
        self._guessed, self._accepted = map(tokens.labels, ("guessed", "accepted"))
        steps = Counter("axrun_step_seconds", "Time spent in engine steps, by phase.", ["phase"], registry=registry)
        self._prefill, self._decode = map(steps.labels, ("prefill", "decode"))
        Gauge("axrun_model_info", "The served model.", ["model"], registry=registry).labels(model).set(1)
        ProcessCollector(registry=registry)

    def watch(self, figures: Callable[[], Mapping[str, int]]) -> None:
        """`figures` is called on every scrape."""
        self._registry.register(_Figures(figures))

    def text(self) -> bytes:
        """https://prometheus.io/docs/instrumenting/exposition_formats"""
        return generate_latest(self._registry)

    def request(self, path: str, status: int) -> None:
        """`status` 0: the client disconnected before the response began."""
        self._requests.labels(path, str(status)).inc()

    def answered(self, seconds: float) -> None:
        """Records a complete answer; `seconds` from the request to the last byte."""
        self._seconds.observe(seconds)

    def cancelled(self) -> None:
        self._cancelled.inc()

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
    def __init__(self, figures: Callable[[], Mapping[str, int]]) -> None:
        self._figures = figures

    def collect(self) -> Iterable[Metric]:
        values = self._figures()
        for figure, (name, text) in GAUGES.items():
            yield GaugeMetricFamily(name, text, value=values[figure])

"""The scheduler in this process: busy slots share runs, or take turns where the engine runs one sequence at a time."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from axrun.batch import Batch
from axrun.format.bundle import Bundle
from axrun.job import Computed, Job
from axrun.model import Model
from axrun.sampling import Sampling
from axrun.serve.errors import ApiError
from axrun.serve.metrics import Metrics, ServerMetrics
from axrun.serve.order import Choice
from axrun.serve.scheduler import Scheduler
from axrun.serve.slots import allocate
from axrun.serve.turn import Ticket
from axrun.serve.writer import Writer
from axrun.text.tokenizer import Tokenizer

SLOTS, LENGTH = 3, 12


def answers(path: Path, engine: str, prompts: Sequence[Sequence[int]]) -> list[str]:
    """The texts of greedy answers that are asked for at the same time."""
    bundle, ended = Bundle.open(path), threading.Event()
    slots = allocate(Model.load(bundle, engine), SLOTS)
    writer = Writer(Tokenizer.open(bundle.hf))
    scheduler = Scheduler(lambda: (slots, writer.write), SLOTS, Metrics(ServerMetrics(["tiny"]), "tiny"), ended.set)
    events: list[list[Any]] = [[] for _ in prompts]
    finished = threading.Semaphore(0)

    def deliver(place: int, event: Any) -> None:
        events[place].append(event)
        if event is None or isinstance(event, Exception):
            finished.release()

    scheduler.state = "ok"  # so that all are queued before the first run
    for place, ids in enumerate(prompts):
        choice = Choice(0, ids, None, Sampling(), None, LENGTH, (), frozenset(), None, False, True)
        scheduler.submit(Ticket(deque([choice]), lambda event, place=place: deliver(place, event), math.inf))  # type: ignore[misc]
    scheduler.start()
    for _ in prompts:
        assert finished.acquire(timeout=120)
    scheduler.stop(0)
    scheduler.join(60)
    assert scheduler.failure is None
    assert all(seen[-1] is None for seen in events)
    return ["".join(piece.text for piece in seen[:-1]) for seen in events]


def test_requests_that_free_slots_take_do_not_fill_the_queue(bundle_s8: Path) -> None:
    """All come before the first run: as many as there are slots, and one that waits."""
    slots, ended = allocate(Model.load(Bundle.open(bundle_s8), "ax"), SLOTS), threading.Event()
    events: list[Any] = []
    choice = Choice(0, [5, 6, 7], None, Sampling(), None, 2, (), frozenset(), None, False, True)

    def burst() -> None:
        for _ in range(SLOTS + 1):
            scheduler.submit(Ticket(deque([choice]), events.append, math.inf))
        with pytest.raises(ApiError, match="already queued"):
            scheduler.submit(Ticket(deque([choice]), events.append, math.inf))
        scheduler.stop(0)

    metrics, writer = Metrics(ServerMetrics(["tiny"]), "tiny"), Writer(Tokenizer.open(Bundle.open(bundle_s8).hf))
    scheduler = Scheduler(lambda: (slots, writer.write), 1, metrics, ended.set, burst)
    scheduler.start()
    scheduler.join(60)
    assert scheduler.failure is None
    assert len(events) == SLOTS + 1  # all are told that the server stops


def test_busy_slots_share_runs(
    bundle_s8: Path, heldout: str, hf_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    run = Batch.run

    def counted(batch: Batch, jobs: Sequence[Job]) -> list[Any]:
        runs.append(len(jobs))
        results = run(batch, jobs)
        assert all(isinstance(result, Computed) for result in results)
        return results

    monkeypatch.setattr(Batch, "run", counted)
    ids = list(hf_tokenizer.encode(heldout))
    prompts = [ids[:9], ids[20:100], ids[50:73]]
    together = answers(bundle_s8, "ax", prompts)
    assert runs.count(SLOTS) >= LENGTH - 3
    runs.clear()
    assert [answers(bundle_s8, "ax", [prompt])[0] for prompt in prompts] == together
    assert not runs
    answers(bundle_s8, "ort", prompts)
    assert not runs, "onnxruntime takes turns"

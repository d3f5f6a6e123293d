"""The files of a bundle as jobs: independent, runnable in any process, skipped if already done."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from axc import embed
from axc.axmodel.writer import Written, write_axmodel, write_file
from axc.calibration.file import CalibrationFile, WithLevels
from axc.checkpoints import EMBEDDING, Checkpoint, Lora
from axc.compile import Target, layer_model, post_model, weights
from axc.families.family import ModelConfig
from axc.graph import Parameter
from axc.quantizer.kept import Kept
from axrun.format.axmodel import Axmodel, Slot, layout
from axrun.format.bundle import sha256

DONE = ".done"  # suffix of the record next to a finished file


@dataclass(frozen=True)
class Work:
    """The inputs shared by all jobs of a build. `stamps` detect changed files: (name, bytes, ctime in ns)."""

    checkpoint: Path
    stamps: tuple[tuple[str, int, int], ...]
    staging: Path
    config: ModelConfig
    target: Target
    kept: Mapping[str, Kept] = field(default_factory=dict)
    adapters: tuple[Lora, ...] = ()
    calibrated: Path | None = None


@dataclass(frozen=True)
class Job:
    """One file: `kind` is layer, post, embedding (written into the staging folder) or input (only hashed)."""

    kind: str
    file: str
    nbytes: int
    index: int = 0


def plan(work: Work, inputs: tuple[Path, ...]) -> list[Job]:
    """All jobs of a build, the longest first. Raises BadInput if a file would be too large for its format."""
    config, target = work.config, work.target
    layers = [
        Job("layer", target.layer_file(config) % index, _size(layer_model(config, target, index, work.kept)[0]), index)
        for index in range(config.num_hidden_layers)
    ]
    post = Job("post", target.post_file(config), _size(post_model(config, target, work.kept)[0]))
    table = Job("embedding", embed.BFLOAT16_FILE, config.vocab_size * config.hidden_size * 2)
    hashed = [Job("input", str(path), path.stat().st_size) for path in inputs]
    return sorted([post, table, *hashed], key=lambda job: -job.nbytes) + layers


def _size(model: Axmodel) -> int:
    return sum(part.tensor.nbytes if isinstance(part, Slot) else len(part) for part in layout(model))


class Cancelled(Exception):
    """Another job failed or the user asked to stop."""


def run(work: Work, job: Job, cancelled: Callable[[], bool] = lambda: False) -> Written:
    """Runs a job, unless its file and a matching record exist already.

    Raises BadInput for a bad checkpoint, OSError for disk errors, Cancelled.
    """
    if job.kind == "input":
        return Written(sha256(Path(job.file), lambda nbytes: _stop(cancelled)), job.nbytes)
    path = work.staging / job.file
    record = path.with_name(path.name + DONE)
    finished = _finished(path, record)
    if finished is not None:
        return finished
    written = _make(work, job, path, lambda: _stop(cancelled))
    write_file(record, iter([json.dumps(asdict(written)).encode()]))
    return written


def _stop(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise Cancelled


def _make(work: Work, job: Job, path: Path, tick: Callable[[], None]) -> Written:
    checkpoint = _opened(work.checkpoint, work.adapters, work.stamps)
    checkpoint = checkpoint.tied() if work.config.tie_word_embeddings else checkpoint
    if job.kind == "embedding":
        return write_file(path, _ticking(embed.bfloat16_blocks(weights(work.config)[EMBEDDING], checkpoint), tick))
    model, parameters = _model(work, job)
    if work.calibrated is not None:
        calibration = _calibration(work.calibrated, work.stamps)
        return write_axmodel(path, model, parameters, WithLevels(checkpoint, calibration), tick)
    return write_axmodel(path, model, parameters, checkpoint, tick)


def _model(work: Work, job: Job) -> tuple[Axmodel, dict[str, Parameter]]:
    if job.kind == "post":
        return post_model(work.config, work.target, work.kept)
    return layer_model(work.config, work.target, job.index, work.kept)


def _ticking(pieces: Iterator[Any], tick: Callable[[], None]) -> Iterator[Any]:
    for piece in pieces:
        tick()
        yield piece


@functools.lru_cache(maxsize=1)
def _opened(path: Path, adapters: tuple[Lora, ...], stamps: tuple[tuple[str, int, int], ...]) -> Checkpoint:
    """Opened once per process and build; `stamps` is a cache key only."""
    return Checkpoint.open(path, adapters)


@functools.lru_cache(maxsize=1)
def _calibration(path: Path, stamps: tuple[tuple[str, int, int], ...]) -> CalibrationFile:
    return CalibrationFile.open(path)


def _finished(path: Path, record: Path) -> Written | None:
    """The result of an earlier run, if the file is complete. It is hashed: a power cut may have emptied it."""
    try:
        written = Written(**json.loads(record.read_text("utf-8")))
        whole = path.stat().st_size == written.nbytes and sha256(path) == written.sha256
    except (OSError, ValueError, TypeError):
        return None
    return written if whole else None

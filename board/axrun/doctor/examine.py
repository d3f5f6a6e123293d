"""axrun doctor: checks a bundle on the machine it runs on, with the figures stored in it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from axrun import machine
from axrun.doctor.cache import cache
from axrun.doctor.context import Context
from axrun.doctor.embedding import embedding
from axrun.doctor.files import files, manifest_digest
from axrun.doctor.installed import Installed, look
from axrun.doctor.layers import layers
from axrun.doctor.post import answer, post
from axrun.doctor.report import Finding, Report
from axrun.doctor.sampling import sampling
from axrun.doctor.stages import Say, Stage, run_stages
from axrun.doctor.text import template, tokenizer
from axrun.doctor.versions import versions
from axrun.errors import BadInput, Failure
from axrun.format import logits
from axrun.format.bundle import MANIFEST, Bundle, read_manifest
from axrun.progress import Show, unseen
from axrun.session import ENGINES, engine_version

SAMPLED = 16  # rows of the reference logits to test the sampler with


def examine(
    path: Path,
    engine: str,
    threads: int | None = None,
    show: Show = unseen,
    say: Say = lambda line: None,
    installed: Installed | None = None,
) -> Report:
    """Runs all stages on a bundle. `show` receives the progress, `say` details of a stage.

    Raises BadInput if the folder does not exist or the engine is not installed.
    """
    if engine not in ENGINES:
        raise BadInput(f"unknown engine {engine!r}; there are: {', '.join(sorted(ENGINES))}")
    if not path.is_dir():
        raise BadInput(f"no bundle folder {path}\nGive the folder that has {MANIFEST}.")
    if not (path / MANIFEST).is_file() and not any(path.glob("*.axmodel")):
        raise BadInput(f"{path} is not a bundle: it has no {MANIFEST} and no axmodels\nGive the folder that has them.")
    if engine == "ort":
        engine_version(engine)  # raises if it is not installed
    here = look() if installed is None else installed
    report = Report(str(path), _maker(path), machine.describe().board or "this machine", engine)
    report.manifest = manifest_digest(path)

    @functools.cache
    def context() -> Context:
        return Context(Bundle.open(path), engine, threads, here, say)

    def of(stage: Callable[[Context], str | Finding]) -> Stage:
        return lambda: stage(context())

    stages: dict[str, Stage] = {
        "files": lambda: files(path),
        "versions": lambda: versions(context().bundle, engine, here),
        "tokenizer": of(tokenizer),
        "template": of(template),
        "embedding": of(embedding),
        "layers": of(layers),
        "cache": of(cache),
        "post": of(post),
        "sampling": lambda: sampling(context().bundle, list(_rows(context().bundle))),
        "answer": of(answer),
    }
    return run_stages(report, stages, show)


def _maker(path: Path) -> str:
    try:
        return str(read_manifest(path)["maker"])
    except Failure:
        return "unknown"


def _rows(bundle: Bundle) -> Iterator[tuple[Any, int]]:
    """The stored reference logits, each row with its most likely token."""
    if logits.NAME not in bundle.manifest["files"]:
        return
    reference = logits.read(bundle.path / logits.NAME)
    if reference.about["vocab_size"] != bundle.vocab_size:
        return
    for ids, kept in zip(reference.ids[0][:SAMPLED], reference.logprobs[0][:SAMPLED]):
        row = np.full(bundle.vocab_size, -1e4, np.float32)
        row[ids] = kept
        yield row, int(ids[kept == kept.max()].min())

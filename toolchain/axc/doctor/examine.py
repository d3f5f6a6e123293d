"""`axc doctor`: runs the stages in order, up to the first that disagrees."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from pathlib import Path

from axc import expected_graphs
from axc.doctor import answer, cache, embedding, layers, post, texts
from axc.doctor.case import REBUILD, Case, Options, Say, Unusable
from axrun.doctor.files import files, manifest_digest
from axrun.doctor.report import Finding, Report
from axrun.doctor.sampling import sampling
from axrun.doctor.stages import run_stages
from axrun.doctor.versions import versions
from axrun.errors import BadInput
from axrun.format.bundle import MANIFEST, read_manifest
from axrun.progress import Show, unseen

Stage = Callable[[], "str | Finding"]


def doctor(options: Options, show: Show = unseen, say: Say = lambda line: None) -> Report:
    """Raises BadInput for a folder that is not a bundle, and for a checkpoint that is unreadable or another model's.

    `show` gets each finished stage, `say` progress lines within a stage.
    """
    _expect_bundle(options.bundle)
    case = Case(options, say)
    report = Report(str(options.bundle), _maker(options.bundle), platform.node() or "this machine", case.engine)
    report.manifest = manifest_digest(options.bundle)
    try:
        run_stages(report, stages(case), show)
    except Unusable as unusable:
        raise unusable.args[0] from None
    if report.finding is not None:
        report.finding = case.blame(report.finding)
    return report


def stages(case: Case) -> dict[str, Stage]:
    """The stages by their names in axrun.doctor.report.STAGES."""

    def of_bundle() -> str | Finding:
        found = files(case.options.bundle)
        if not isinstance(found, Finding):
            try:
                return case.expect_same_model() or _flags(case) or found + _changed(case)
            except BadInput as other:
                raise Unusable(other) from None
        return found

    return {
        "files": of_bundle,
        "versions": lambda: versions(case.bundle, case.engine),
        "tokenizer": functools.partial(texts.tokenizer, case),
        "template": functools.partial(texts.template, case),
        "embedding": functools.partial(embedding.examine, case),
        "layers": functools.partial(layers.examine, case),
        "cache": functools.partial(cache.examine, case),
        "post": functools.partial(post.examine, case),
        "sampling": lambda: sampling(case.bundle),
        "answer": functools.partial(answer.examine, case),
    }


def _flags(case: Case) -> Finding | None:
    """A finding for unknown flags, because graphs cannot be compared then."""
    bundle = case.bundle
    if bundle.maker != "cpu" or expected_graphs.target(bundle.manifest) is not None:
        return None
    seen = ", ".join(sorted(map(str, bundle.manifest["flags"])))
    cause = "the manifest was edited, or another version of axc built it"
    return Finding("files", "flags", MANIFEST, ", ".join(expected_graphs.FLAGS), f"{seen:.200}", cause, REBUILD)


def _changed(case: Case) -> str:
    names = ", ".join(case.changed_inputs[:3])
    return f"; checkpoint files changed since the build: {names}" if names else ""


def _expect_bundle(folder: Path) -> None:
    """Raises BadInput unless the folder has a manifest or axmodels (a bundle that lost its manifest)."""
    if not folder.is_dir():
        raise BadInput(f"no bundle folder {folder}\nBuild one with `make build` or `axc llm_build`.")
    if not (folder / MANIFEST).is_file() and not any(folder.glob("*.axmodel")):
        raise BadInput(f"{folder} is not a bundle: it has no {MANIFEST} and no axmodels\nGive the folder of a bundle.")


def _maker(folder: Path) -> str:
    try:
        return str(read_manifest(folder)["maker"])
    except BadInput:
        return "unknown"

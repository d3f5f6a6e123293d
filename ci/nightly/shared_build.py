"""python -m ci.nightly.shared_build MODEL CHIP FOLDER [--model-dir DIR] [--limit STAGE=SECONDS]: one build for several
boards.

Builds the bundle the way a night does, adds the float32 checkpoint's logits, and writes FOLDER/built.json, with the
reason if the build failed. The nights of a matrix take the bundle from there (ci/nightly/built.py). The exit code is
that of the build.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from axrun.errors import BadInput, Failure
from axrun.format.bundle import MANIFEST, sha256
from ci.nightly import built, checkout, pipeline, stage, variant
from ci.nightly.built import Built
from ci.nightly.night import Signals
from ci.nightly.stage import Stage
from ci.nightly.variant import Variant


def make(model: Variant, chip: str, folder: Path, model_dir: Path | None, options: pipeline.Options) -> int:
    """Builds into `folder`, which is emptied first; returns 0 or the exit code of the failed stage. Raises BadInput."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise BadInput(f"cannot make {folder}: {error.strerror or error}") from None
    started, commit, signals = time.monotonic(), checkout.commit(), Signals()
    stage.adopt_orphans()
    with signals.caught():
        code, reason = _stages(model, chip, folder, model_dir, options, signals)
        manifest = "" if reason else sha256(folder / model.spec.name / MANIFEST)
        Built(model.name, chip, commit, manifest, time.monotonic() - started, reason).write(folder)
    return code


def _stages(
    model: Variant, chip: str, folder: Path, model_dir: Path | None, options: pipeline.Options, signals: Signals
) -> tuple[int, str]:
    """Exit code and reason of the first failed stage; 0 and an empty reason on success."""

    def run(name: str, *words: str) -> Stage:
        print(f"{name} ...", flush=True)
        done = stage.run(
            name,
            [sys.executable, "-m", *words],
            limit=options.limit(name),
            console=folder / f"{name}.log",
            cwd=pipeline.ROOT,
            environment={"PYTHONUNBUFFERED": "1"},
            stop=lambda: signals.reason,
        )
        print(f"{name} {done.outcome} after {done.seconds:.1f} s" + (f": {done.reason}" if done.failed else ""))
        return done

    try:
        flags = pipeline.build_flags(model, chip, folder, folder / built.CHECK, model_dir)
        done = run("build", "invoke", "build", *flags)
        if not done.failed and (
            words := pipeline.reference_flags(folder / model.spec.name, model, model_dir, folder / "text.txt")
        ):
            done = run("reference", "axc", "reference", *words)
    except Failure as failure:
        return failure.exit_code, str(failure)
    return (
        (done.code, done.reason if done.name == "build" else f"{done.name}: {done.reason}") if done.failed else (0, "")
    )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m ci.nightly.shared_build", description=(__doc__ or "").partition("\n\n")[2]
    )
    parser.add_argument("model", help="one of models/*.toml, or with another weight type: tiny-qwen2@s4")
    parser.add_argument("chip", help="the target chip, as for --chip of axc llm_build")
    parser.add_argument("folder", type=Path, help="the output folder; its old content is deleted")
    parser.add_argument("--model-dir", type=Path, help="the folder of the checkpoint, for a machine without network")
    parser.add_argument("--limit", action="append", default=[], help="time limit of a stage in seconds: build=600")
    given = parser.parse_args(argv)
    try:
        options = pipeline.Options("", given.model, given.folder, given.folder, limits=pipeline.limits(given.limit))
        return make(variant.find(given.model), given.chip, given.folder.absolute(), given.model_dir, options)
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        return failure.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

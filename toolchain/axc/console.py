"""Terminal output of the commands: config, estimate, progress bars, finished steps."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from axc import build, logits
from axc import synth as synthesis
from axc.budget import megabytes
from axc.calibration import cache as calibration_cache
from axc.calibration import options as calibrations
from axc.calibration import text as calibration_text
from axc.calibration.file import CalibrationFile, entries
from axc.rope import Rope
from axrun.errors import BadInput, CheckFailed
from axrun.format import bundle
from axrun.progress import show_on_terminal

# kind of job -> title of its progress bar
BARS = {"layer": "layers", "post": "post, embedding", "embedding": "post, embedding", "input": "sha256 of inputs"}


def llm_build(
    options: build.Options,
    check_level: int,
    prompt: str,
    report: Path | None,
    calibration: calibrations.Options | None = None,
    notes: Sequence[str] = (),
) -> None:
    """The steps of llm_build: calibrate (if requested), prepare, build, check. Raises BadInput, CheckFailed.

    `notes` are printed with those of the plan.
    """
    if calibration:
        # Whatever will be refused is refused before minutes of calibration.
        uncalibrated = build.plan(replace(options, weight_type=calibration.weight_type))
        text = calibration_text.digest(calibration.calibration)
        build.refuse_before_calibration(uncalibrated, calibration.decided(), text)
        if options.weight_type is None and calibration.bits is None:
            print("note: without -w, calibrated weights are s4; for 8 bits, set -w s8", flush=True)
        options = replace(options, calibrated=_calibrated(calibration), weight_type=None)
    started = time.monotonic()
    planned = build.plan(options)
    for notice in (*planned.notices, *notes):
        print(f"note: {notice}")
    print(f"Config({_values(planned.config)})")
    print(f"Target({_values(planned.target)})")
    print(f"bundle {options.output_path} {planned.budget.text()}", flush=True)
    _done("prepare", started)
    spare = check_level < 1 and not planned.checkpoint.gguf  # transformers needs torch to read a GGUF
    if spare and "torch" not in sys.modules:
        _spare_torch()

    started = time.monotonic()
    bars = {
        title: tqdm(
            total=sum(BARS[job.kind] == title for job in planned.jobs),
            desc=f"{title:<16}",
            position=row,
            file=sys.stderr,
            disable=None,  # on anything but a terminal
            bar_format="{desc} {bar:40} {n_fmt}/{total_fmt} in {elapsed}",
        )
        for row, title in enumerate(dict.fromkeys(BARS.values()))
    }
    try:
        manifest, fresh = build.build(planned, lambda job: bars[BARS[job.kind]].update(), tqdm.write)
    finally:
        for bar in bars.values():
            bar.close()
    if not fresh:
        print(f"{options.output_path} is already this bundle and complete: nothing to build")
    total = sum(entry["size"] for entry in manifest["files"].values())
    print(f"{options.output_path}: {len(manifest['files'])} files, {megabytes(total)}, sha256 of each in the manifest")
    print(_worst(manifest))
    _done("build", started)

    started = time.monotonic()
    if check_level < 0:
        print("check skipped: --check_level -1", flush=True)
        return
    from axc import check

    try:
        check.check(planned, check_level, prompt, print, report)
    except CheckFailed as failure:
        where = f"axc doctor {options.output_path} --checkpoint {options.input_path}"
        raise CheckFailed(
            f"{failure}\nThe bundle is kept for examination: {where}; then build it again with --force."
        ) from None
    _done("check", started)


def calibrate(options: calibrations.Options, output: Path) -> None:
    """Writes a calibration file with a progress bar, and prints a summary. Raises BadInput."""
    try:
        from axc.calibration import run
    except ImportError:
        raise BadInput(
            "calibration needs torch and transformers, which are not installed\n"
            "Run `make setup`, or round to nearest: --quantizer rtn."
        ) from None
    started = time.monotonic()
    with tqdm(file=sys.stderr, disable=None, bar_format="{desc:<34} {bar:40} {n_fmt}/{total_fmt} in {elapsed}") as bar:

        def progress(done: int, total: int, what: str) -> None:
            if bar.disable:  # not a terminal
                print(f"calibrate {what}", file=sys.stderr, flush=True)
            bar.total, bar.n = total, done
            bar.set_description_str(f"calibrate {what}")

        try:
            run.calibrate(options, output, progress, tqdm.write)
        except KeyboardInterrupt:
            if not run.has_finished_layers(output):
                raise
            raise KeyboardInterrupt("finished layers are kept: run the same command again") from None
    found = CalibrationFile.open(output)
    worst = max(found.weights.values(), key=lambda entry: entry.output_error)
    print(f"{output}: {len(found.weights)} matrices, {found.bits:g} bits per weight, sha256 {found.sha256}")
    print(f"worst relative error of a matrix's outputs: {worst.output_error:.2%}")
    _done("calibrate", started)


def _worst(manifest: dict[str, Any]) -> str:
    """The worst error of a bundle's matrices: of outputs where they were calibrated, which trades weights for them."""
    if calibrated := entries(manifest):
        worst = max(entry.output_error for entry in calibrated.values())
        return f"calibrated matrices: relative error of their outputs at most {worst:.2%} (calibration text)"
    return f"rounded matrices: relative error of their weights at most {manifest['accuracy']['worst_weight_error']:.2%}"


def _calibrated(options: calibrations.Options) -> Path:
    """The calibration file of a build, from the cache unless it is missing or damaged there. Raises BadInput."""
    path = calibration_cache.place(options)
    with calibration_cache.locked(path):
        if path.is_file():
            try:
                CalibrationFile.open(path)
            except BadInput as damaged:
                print(f"note: {str(damaged).splitlines()[0]}; calibrating again", flush=True)
                path.unlink()
        if path.is_file():
            print(f"note: calibration taken from the cache: {path}", flush=True)
        else:
            calibrate(options, path)
    return path


def _values(of: Any) -> str:
    """`name=value` of each field of a dataclass."""
    pairs = ((field.name, getattr(of, field.name)) for field in fields(of))
    return ", ".join(f"{name}={value if isinstance(value, Rope) else repr(value)}" for name, value in pairs)


def _spare_torch() -> None:
    """Makes transformers load the tokenizer without torch, whose import takes longer than building a small model.

    It affects the rest of this process, unless reading a .bin checkpoint has already imported torch.
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]


def _done(step: str, started: float, remark: str = "") -> None:
    print(f"{step} done in {time.monotonic() - started:.1f} s{remark}", flush=True)


def verify(path: Path, *, as_json: bool) -> None:
    """Verifies a bundle and prints the result. Raises BadInput, CheckFailed."""
    total = sum(entry["size"] for entry in bundle.read_manifest(path)["files"].values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", file=sys.stderr, leave=False, disable=None) as bar:
        manifest = bundle.verify(path, bar.update)
    summary: dict[str, Any] = {"bundle": str(path), "files": len(manifest["files"]), "bytes": total}
    text = f"{path}: {summary['files']} files, {megabytes(total)}, all as built by {bundle.compiler(manifest)}"
    print(json.dumps({**summary, "tools": manifest["tools"], "verified": True}) if as_json else text)


def reference(options: logits.Options) -> None:
    """Writes reference logits and describes them. Raises BadInput."""
    path, written = logits.write(options, show_on_terminal, print)
    for line in logits.lines(path, written):
        print(line)


def synth(model: str, output: Path, seed: int, tokenizer: Path | None) -> None:
    """Writes a random checkpoint with a progress bar. Raises BadInput."""
    total = synthesis.nbytes(model)
    with tqdm(total=total, unit="B", unit_scale=True, desc="synth", file=sys.stderr, disable=None) as bar:
        synthesis.synth(model, output, seed, tokenizer, bar.update)
    print(f"{output}: random weights in the shapes of {model}, seed {seed}")

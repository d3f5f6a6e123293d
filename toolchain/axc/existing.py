"""Examines an existing bundle at the output path: identical to what the build would make, or how it differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from axc import hf_folder, identity
from axc.bundle import input_name
from axrun.errors import BadInput, CheckFailed
from axrun.format.bundle import MANIFEST, read_manifest, sha256, verify

if TYPE_CHECKING:
    from axc.build import Plan

CALIBRATION = "calibration"  # the manifest's name of a file given with --calibrated
MODEL_CONFIG = "model_config"  # the manifest's name of a config.json given with --model_config
SHOWN = 2  # named differences; the rest is counted


class Existing(NamedTuple):
    """`manifest` of an identical, complete bundle, else None; `reason` says how another bundle differs."""

    manifest: dict[str, Any] | None
    reason: str


def find(planned: Plan) -> Existing:
    """Examines the output path of a build by this compiler."""
    if not (planned.output / MANIFEST).is_file():
        return Existing(None, "")
    try:
        manifest = read_manifest(planned.output)
        differences = list(_made_otherwise(planned, manifest) or _made_from_others(planned, manifest))
        if not differences:
            return Existing(verify(planned.output), "")
    except (BadInput, CheckFailed) as error:
        return Existing(None, str(error).partition("\n")[0].removeprefix(f"{planned.output} "))
    except (AttributeError, KeyError, TypeError):
        return Existing(None, "its manifest does not say what it was made from")
    return Existing(None, _listed(differences))


def before_calibration(planned: Plan, algorithm: Mapping[str, Any], text: str) -> str:
    """How a bundle at the output path differs from a build that has yet to calibrate; "" if it does not, or is damaged.

    `planned` is without the calibration file, `algorithm` what its header will have besides others, `text` the SHA-256
    of the calibration text. Reads no large file.
    """
    try:
        manifest = read_manifest(planned.output)
        differences = _made_otherwise(planned, manifest)
        if CALIBRATION not in manifest["inputs"]:
            differences.append("it was not calibrated, this build is")
        else:
            differences += _calibrated_otherwise(manifest["calibration"], algorithm, text)
    except (BadInput, AttributeError, KeyError, TypeError):
        return ""  # `find` says why
    return _listed(differences)


def _listed(differences: list[str]) -> str:
    more = f" (and {len(differences) - SHOWN} more)" if len(differences) > SHOWN else ""
    return "; ".join(differences[:SHOWN]) + more


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values after a round trip through JSON: tuples become lists."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _made_otherwise(planned: Plan, manifest: Mapping[str, Any]) -> list[str]:
    """Differences in compiler, flags and names; reads no large file."""
    found = []
    made, mine, maker = manifest["tools"], identity.tools(), manifest["maker"]
    if maker != "cpu":
        found.append(f"its axmodels were made by {maker!a:.40}")
    elif made != mine:
        others = [name for name in (*mine, *made) if made.get(name) != mine.get(name)]
        pairs = (f"{name} {made.get(name, 'none')}, here {mine.get(name, 'none')}" for name in others)
        how = (
            "axc's sources changed since it was built"
            if set(others) == {"digest"}
            else "it was built by another compiler"
        )
        found.append(f"{how} ({'; '.join(dict.fromkeys(pairs))})")
    mended_by, here = manifest["text"].get("mended_by"), hf_folder.mender()
    if mended_by and mended_by != here:
        found.append(f"its tokenizer was repaired by {mended_by!a:.60}, installed is {here or 'no transformers'}")
    if here and not manifest["text"].get("compared", True):
        found.append("its tokenizer was not compared with transformers', which is now installed")
    wanted, given = as_json(asdict(planned.target)), manifest["flags"]
    for flag in sorted({*wanted, *given}):
        if wanted.get(flag) != given.get(flag):
            found.append(f"it has --{flag} {_value(given.get(flag))}, this build {_value(wanted.get(flag))}")
    weights = [adapter.weight for adapter in planned.checkpoint.adapters]
    merged = [adapter["weight"] for adapter in manifest.get("adapters", [])]
    if merged != weights:
        found.append(f"it has adapters of weight {_value(merged)}, this build {_value(weights)}")
    for what, value in (("name", planned.name), ("model_type", planned.config.model_type)):
        if manifest["model"][what] != value:
            found.append(f"its model's {what} is {manifest['model'][what]!a:.40}, this build's {value!r:.40}")
    return found


def _made_from_others(planned: Plan, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Differences in the inputs; files of equal size are hashed."""
    recorded, calibration = manifest["inputs"], manifest.get("calibration")
    checkpoint = planned.checkpoint
    files = {input_name(path, checkpoint.path, checkpoint.adapters): path for path in planned.inputs}
    if planned.options.model_config:
        files[MODEL_CONFIG] = planned.options.model_config
    if planned.options.calibrated:
        files[CALIBRATION] = planned.options.calibrated
    for name in sorted({*files, *recorded}):
        if name not in files:
            yield (
                "it was calibrated, this build is not" if name == CALIBRATION else f"it was also made from {name!a:.60}"
            )
        elif name not in recorded:
            made = "it was not calibrated, this build is"
            yield made if name == CALIBRATION else f"it was made without {_input(name, files[name])}"
        elif not _same(files[name], recorded[name]):
            said = list(_other_settings(planned, calibration)) if name == CALIBRATION else []
            yield from said or [f"{_input(name, files[name])} has changed since"]


def _other_settings(planned: Plan, recorded: Mapping[str, Any] | None) -> Iterator[str]:
    """Differences between the settings of two calibrations."""
    if planned.calibration and recorded:
        header = planned.calibration.header
        yield from _calibrated_otherwise(recorded, header["algorithm"], header["text"]["sha256"])
        if recorded["text"]["tokens"] != header["text"]["tokens"]:
            yield f"it was calibrated on {recorded['text']['tokens']} tokens, this build on {header['text']['tokens']}"


def _calibrated_otherwise(recorded: Mapping[str, Any], algorithm: Mapping[str, Any], text: str) -> Iterator[str]:
    made = recorded["algorithm"]
    for name in ("weight_type", "block", "bits"):
        if made.get(name) != algorithm.get(name):
            flag, theirs, ours = f"--{name}" if name != "block" else "blocks of", made.get(name), algorithm.get(name)
            yield f"it was calibrated with {flag} {_value(theirs)}, this build with {_value(ours)}"
            return  # the block follows from the type
    if recorded["text"]["sha256"] != text:
        yield "it was calibrated on another text"


def _same(path: Path, recorded: Mapping[str, Any]) -> bool:
    return bool(path.stat().st_size == recorded["size"] and sha256(path) == recorded["sha256"])


def _input(name: str, path: Path) -> str:
    return f"--model_config {path}" if name == MODEL_CONFIG else f"--calibrated {path}" if name == CALIBRATION else name


def _value(value: object) -> str:
    if value is None:
        return "none"
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else f"{value!a:.40}".strip("'\"")

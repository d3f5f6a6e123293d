"""The record of a shared build of a matrix: FOLDER/MODEL is the bundle, FOLDER/built.json its record.

A night uses it only if it would have built the same: model, weight type, chip and commit must match, and the bundle's
manifest must have the recorded sha256. ci/nightly/shared_build.py writes it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from axrun.errors import BadInput, CheckFailed
from axrun.format.bundle import MANIFEST, sha256
from ci.device import strict_json
from ci.nightly import checkout
from ci.nightly.variant import Variant

RECORD = "built.json"
CHECK = "check.json"  # per-layer errors of the check after the build
LONGEST = 1 << 16  # bytes of a record


@dataclass(frozen=True)
class Built:
    """`model` is a name of ci.nightly.variant. `reason` says why the build failed, empty on success.

    `manifest_sha256` is empty for a failed build; `seconds` is the time of build and reference.
    """

    model: str
    chip: str
    commit: str
    manifest_sha256: str
    seconds: float
    reason: str

    def write(self, folder: Path) -> None:
        part = folder / f"{RECORD}.part"
        part.write_text(json.dumps(asdict(self), indent=1, sort_keys=True) + "\n", "utf-8")
        part.replace(folder / RECORD)


def read(folder: Path) -> Built:
    """Raises BadInput for a folder without a valid record."""
    file = folder / RECORD
    try:
        found = Built(**strict_json.read(file, LONGEST))
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{file} is not the record of a build: {str(error)[:200]}") from None
    texts = (found.model, found.chip, found.commit, found.manifest_sha256, found.reason)
    if not all(isinstance(text, str) for text in texts) or not isinstance(found.seconds, (int, float)):
        raise BadInput(f"{file} is not the record of a build: expected strings, and a number of seconds")
    return found


def require(folder: Path, model: Variant, chip: str) -> Built:
    """The build in `folder`. Raises CheckFailed if it failed, BadInput if a night would build something else."""
    found = read(folder)
    if found.reason:
        raise CheckFailed(found.reason)
    for what, seen, wanted in (
        ("model", found.model, model.name),
        ("chip", found.chip, chip),
        ("commit", found.commit, checkout.commit()),
        ("manifest's sha256", found.manifest_sha256, _manifest(folder / model.spec.name)),
    ):
        if seen != wanted:
            raise BadInput(
                f"the shared build in {folder} does not match: its {what} is {seen!a:.80}, expected {wanted!a:.80}\n"
                "Run the matrix again, and do not change the checkout meanwhile."
            )
    return found


def _manifest(bundle: Path) -> str:
    return sha256(bundle / MANIFEST) if (bundle / MANIFEST).is_file() else ""

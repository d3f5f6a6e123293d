"""The record of a build that the boards of a matrix share: FOLDER/MODEL is the bundle, FOLDER/built.json says of what.

A night takes it in place of a build of its own only where it would have built the same: the same model, weight type,
chip and commit, and the manifest that the record names. ci/nightly/shared_build.py makes it.
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
CHECK = "check.json"  # what the check after the build found of every layer
LONGEST = 1 << 16  # bytes of a record


@dataclass(frozen=True)
class Built:
    """`model` as ci.nightly.variant names it; `reason` says why the build failed, empty where it did not.

    `manifest_sha256` is empty where it failed, `seconds` is how long build and reference took.
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
    """Raises BadInput for a folder without a record that can be read."""
    file = folder / RECORD
    try:
        found = Built(**strict_json.read(file, LONGEST))
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{file} is no record of a build: {str(error)[:200]}") from None
    texts = (found.model, found.chip, found.commit, found.manifest_sha256, found.reason)
    if not all(isinstance(text, str) for text in texts) or not isinstance(found.seconds, (int, float)):
        raise BadInput(f"{file} is no record of a build: expected texts, and a number of seconds")
    return found


def require(folder: Path, model: Variant, chip: str) -> Built:
    """The build in `folder`. Raises CheckFailed where it failed, BadInput where it is not what a night would build."""
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
                f"the shared build in {folder} is another: its {what} is {seen!a:.80}, expected {wanted!a:.80}\n"
                "Hold the matrix again, and leave the checkout alone meanwhile."
            )
    return found


def _manifest(bundle: Path) -> str:
    return sha256(bundle / MANIFEST) if (bundle / MANIFEST).is_file() else ""

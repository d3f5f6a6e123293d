"""What a night says of itself to whoever started it: a JSON file, written by `invoke nightly --summary FILE`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axrun.errors import BadInput
from ci.device import strict_json

if TYPE_CHECKING:
    from ci.nightly.night import Held

LONGEST = 1 << 22  # bytes of a file


@dataclass(frozen=True)
class Judged:
    """A figure of the night as its report shows it; `gate` is empty where there is none."""

    figure: str
    outcome: str
    value: str
    gate: str


@dataclass(frozen=True)
class Summary:
    """`word` is the verdict's, `code` the exit code, `night` the line of history, `report` the page of the night."""

    headline: str
    word: str
    code: int
    reason: str
    advice: str
    judged: tuple[Judged, ...]
    notes: tuple[str, ...]
    report: str
    night: dict[str, Any]

    @property
    def unjudged(self) -> bool:
        return self.word == "green" and bool(self.reason)


def write(file: Path, held: Held) -> None:
    """Raises BadInput when it cannot be written."""
    judged = tuple(Judged(entry.metric.name, entry.outcome, entry.value_text, entry.gate_text) for entry in held.judged)
    found = held.verdict
    summary = Summary(
        headline=held.headline,
        word=found.word,
        code=found.code,
        reason=found.reason,
        advice=found.advice,
        judged=judged,
        notes=tuple(held.notes),
        report=str(held.report),
        night=dataclasses.asdict(held.night),
    )
    part = file.with_name(f"{file.name}.part")
    try:
        part.write_text(json.dumps(dataclasses.asdict(summary), indent=1) + "\n", "utf-8")
        part.replace(file)
    except OSError as error:
        raise BadInput(f"cannot write {file}: {error.strerror or error}") from None


def read(file: Path) -> Summary | None:
    """None where there is none, as of a night that never began. Raises BadInput for a damaged one."""
    try:
        found = strict_json.read(file, LONGEST)
        judged = tuple(Judged(**entry) for entry in found.pop("judged"))
        return Summary(**{**found, "judged": judged, "notes": tuple(found["notes"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BadInput(f"{file} is no summary of a night: {str(error)[:200]}") from None

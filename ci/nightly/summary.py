"""The result of a night as a JSON file, for the process that started it: `invoke nightly --summary FILE`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axrun.errors import BadInput
from ci.device import strict_json

if TYPE_CHECKING:
    from ci.nightly.night import NightResult

LONGEST = 1 << 22  # bytes of a file


@dataclass(frozen=True)
class Judged:
    """A figure as the report shows it; `gate` is empty if there is none."""

    figure: str
    outcome: str
    value: str
    gate: str


@dataclass(frozen=True)
class Summary:
    """`word` is green or red, `code` the exit code, `night` the line of history, `report` the path of the page."""

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


def write(file: Path, result: NightResult) -> None:
    """Raises BadInput for a file that cannot be written."""
    judged = tuple(Judged(one.metric.name, one.outcome, one.value_text, one.gate_text) for one in result.judged)
    found = result.verdict
    summary = Summary(
        headline=result.headline,
        word=found.word,
        code=found.code,
        reason=found.reason,
        advice=found.advice,
        judged=judged,
        notes=tuple(result.notes),
        report=str(result.report),
        night=dataclasses.asdict(result.night),
    )
    part = file.with_name(f"{file.name}.part")
    try:
        part.write_text(json.dumps(dataclasses.asdict(summary), indent=1) + "\n", "utf-8")
        part.replace(file)
    except OSError as error:
        raise BadInput(f"cannot write {file}: {error.strerror or error}") from None


def read(file: Path) -> Summary | None:
    """None if there is no file: the night never began. Raises BadInput for a damaged one."""
    try:
        found = strict_json.read(file, LONGEST)
        judged = tuple(Judged(**entry) for entry in found.pop("judged"))
        return Summary(**{**found, "judged": judged, "notes": tuple(found["notes"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BadInput(f"{file} is not the summary of a night: {str(error)[:200]}") from None

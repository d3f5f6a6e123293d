"""The history of nights: one JSON object per line in FOLDER/BOARD/MODEL.jsonl, append-only.

A line truncated by a crash stays and is reported; the next night starts on a new line.
"""

from __future__ import annotations

import dataclasses
import datetime
import fcntl
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from axrun.errors import BadInput
from ci.device import strict_json
from ci.nightly import metrics
from ci.nightly.gate import NAME

SCHEMA = 1
LONGEST = 1 << 20  # bytes of a line
LARGEST = 1 << 28  # bytes of a file: a night has about 10 KB
YEARS = range(2020, 2100)  # valid years of a start time
SECONDS = 1e7  # longest valid duration of a night
NEEDED = {"board", "model", "started", "seconds", "verdict", "reason"}
FORMS = {
    "verdict": "green|red",
    "blame": "(board|code)?",
    "commit": r"([0-9a-f]{7,64}\+?)?",
    "started": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ",
}


@dataclass(frozen=True)
class Night:
    """The record of one night.

    started, seconds: start in UTC (ISO 8601), and duration.
    verdict, reason, stage: green or red, why, and the failed stage. A green night with a reason was not judged.
    commit: of this repository, with `+` if the working tree had changes.
    handed_in: the bundle was built elsewhere.
    files: digests of the bundle's files by name.
    release, package, engine_sha256: the code that ran on the board.
    pins: the locked version of every requirement.
    figures, gates: measured values and gates, by metric.
    layers: from the check after the build: lowest cosine and largest error, by part and stage ("layer 0 prefill").
    blame: `board` or `code` if the health check of a red night can tell.
    sensors: minimum, median and maximum during the measurement.
    flaky: why the first attempt failed, if there was a second.
    quarantined: failures that did not count, with owner and end date (ci/nightly/quarantine.py).
    culprit: the commit found by a bisection, with its subject.
    """

    board: str
    model: str
    started: str
    seconds: float
    verdict: str
    reason: str
    stage: str = ""
    commit: str = ""
    maker: str = ""
    engine: str = ""
    manifest_sha256: str = ""
    reference_sha256: str = ""
    release: str = ""
    package: str = ""
    engine_sha256: str = ""
    handed_in: bool = False
    flaky: str = ""
    culprit: str = ""
    quarantined: Mapping[str, str] = field(default_factory=dict)
    gates: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    pins: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, Sequence[float]] = field(default_factory=dict)
    blame: str = ""
    sensors: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def green(self) -> bool:
        return self.verdict == "green"

    @property
    def judged_green(self) -> bool:
        """Green and judged by gates."""
        return self.green and not self.reason


class History(NamedTuple):
    """The nights, oldest first, and a message for every unreadable line."""

    nights: tuple[Night, ...]
    faults: tuple[str, ...]


def place(folder: Path, board: str, model: str) -> Path:
    """The file of a board and a model. Raises BadInput for invalid names."""
    for name in (board, model):
        if not NAME.fullmatch(name):
            raise BadInput(f"{name!a:.60} is not a valid name of a board or a model")
    return folder / board / f"{model}.jsonl"


def append(folder: Path, night: Night) -> Path:
    """Appends a night and syncs it to disk; safe with concurrent writers. Returns the file.

    Raises BadInput if the file cannot be written, and for a night that `read` would skip.
    """
    file = place(folder, night.board, night.model)
    line = json.dumps({"schema": SCHEMA, **dataclasses.asdict(night)}, sort_keys=True).encode()
    try:
        _night(line, night.board, night.model)
    except ValueError as error:
        raise BadInput(f"this night is not a valid line of {file}: {error}") from None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a+b", buffering=0) as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            size = stream.seek(0, os.SEEK_END)
            torn = size > 0 and os.pread(stream.fileno(), 1, size - 1) != b"\n"
            data = (b"\n" if torn else b"") + line + b"\n"
            if stream.write(data) != len(data):
                raise OSError("only a part of the line was written")
            os.fsync(stream.fileno())
    except OSError as error:
        raise BadInput(f"cannot add to {file}: {error.strerror or error}") from None
    return file


def require_writable(folder: Path, board: str, model: str) -> None:
    """Raises BadInput if a night could not be appended."""
    file = place(folder, board, model)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "ab"):
            pass
    except OSError as error:
        raise BadInput(f"cannot add to {file}: {error.strerror or error}\nChoose another folder: --history") from None


def read(folder: Path, board: str, model: str) -> History:
    """Every night of a board and a model; empty without a file. Raises BadInput for an unreadable file."""
    file = place(folder, board, model)
    nights, faults = [], []
    try:
        if file.exists():
            with file.open("rb") as stream:
                data = stream.read(LARGEST + 1)
        else:
            data = b""
    except OSError as error:
        raise BadInput(f"cannot read {file}: {error.strerror or error}") from None
    if len(data) > LARGEST:
        raise BadInput(f"{file} has more than {LARGEST >> 20} MB\nMove its oldest lines to another file.")
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line:
            continue
        try:
            nights.append(_night(line, board, model))
        except ValueError as error:
            faults.append(f"{file.name} line {number} is skipped: {error}")
    return History(tuple(nights), tuple(faults))


def of_board(folder: Path, board: str) -> tuple[Night, ...]:
    """The nights of a board with any model, oldest first; unreadable lines are skipped."""
    files = sorted((folder / board).glob("*.jsonl"))
    models = [file.stem for file in files if NAME.fullmatch(file.stem)]
    found = [night for model in models for night in read(folder, board, model).nights]
    return tuple(sorted(found, key=lambda night: night.started))


def last_green(nights: Iterable[Night]) -> Night | None:
    """The last night that was judged green."""
    return next((night for night in reversed(tuple(nights)) if night.judged_green), None)


def measured(nights: Iterable[Night], maker: str) -> list[Night]:
    """The nights of a maker that measured figures, green or red."""
    return [night for night in nights if night.maker == maker and night.figures]


def _night(line: bytes, board: str, model: str) -> Night:
    """Parses a line. Raises ValueError with the fault."""
    if len(line) > LONGEST:
        raise ValueError(f"it has {len(line)} bytes")
    try:
        values = strict_json.loads(line)
    except json.JSONDecodeError:
        seen = line[:30].decode("ascii", "backslashreplace")
        raise ValueError(f"not JSON, perhaps truncated by a crash: {seen!r}") from None
    if not isinstance(values, dict) or values.pop("schema", None) != SCHEMA:
        raise ValueError(f"not a night of schema {SCHEMA}")
    known = {entry.name for entry in dataclasses.fields(Night)}
    if not NEEDED <= set(values) <= known:
        raise ValueError(f"it has {', '.join(ascii(key)[1:-1] for key in sorted(values))[:200]}")
    for name, value in values.items():
        if why := _unfit(name, value):
            raise ValueError(f"its {name} {why}")
    if (values["board"], values["model"]) != (board, model):
        raise ValueError(f"it is of {values['model']!a:.60} on {values['board']!a:.60}")
    return Night(**values)


def _unfit(name: str, value: Any) -> str:
    """The fault of a field of a night; empty if it is valid."""
    if name == "figures" and isinstance(value, dict):
        wrong = [key for key, entry in value.items() if not _is_figure(key, entry)]
        return f"have {wrong[0]!a:.40}: {value[wrong[0]]!a:.40}" if wrong else ""
    return "" if _fits(name, value) else f"is {value!a:.40}"


def _fits(name: str, value: Any) -> bool:
    if name == "seconds":
        return metrics.is_figure(value) and 0 <= value <= SECONDS
    if name == "started":
        return isinstance(value, str) and _is_time(value)
    if name == "layers":
        return isinstance(value, dict) and all(_is_pair(entry) for entry in value.values())
    if name == "sensors":
        return isinstance(value, dict) and all(_are_numbers(entry) for entry in value.values())
    if name == "handed_in":
        return isinstance(value, bool)
    if name == "gates" and not (isinstance(value, dict) and all(_is_figure(key, 0.0) for key in value)):
        return False
    if name in ("files", "pins", "machine", "gates", "quarantined"):
        return isinstance(value, dict) and all(isinstance(entry, str) for entry in value.values())
    return isinstance(value, str) and re.fullmatch(FORMS.get(name, "(?s).{0,10000}"), value) is not None


def _is_time(text: str) -> bool:
    try:
        return (
            re.fullmatch(FORMS["started"], text) is not None
            and datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").year in YEARS
        )
    except ValueError:
        return False


def _is_figure(name: str, value: Any) -> bool:
    try:
        metrics.find(name)
    except BadInput:
        return False
    return metrics.is_figure(value)


def _is_pair(value: Any) -> bool:
    return _are_numbers(value) and len(value) == 2


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(metrics.is_figure, value))

"""The nights that were held, one JSON object a line, in FOLDER/BOARD/MODEL.jsonl. Lines are added, never changed.

A line that a crash tore is left where it is and reported; the next night begins on a line of its own.
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
YEARS = range(2020, 2100)  # a night began in one of them
SECONDS = 1e7  # that a night may have taken
NEEDED = {"board", "model", "started", "seconds", "verdict", "reason"}
FORMS = {
    "verdict": "green|red",
    "blame": "(board|code)?",
    "commit": r"([0-9a-f]{7,64}\+?)?",
    "started": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ",
}


@dataclass(frozen=True)
class Night:
    """What one night was, and what it measured.

    `started` in UTC, ISO 8601; `seconds` it took; `stage` the one that failed, empty when green. `commit` is of this
    repository, with `+` where the working tree had changes. `handed_in`: the bundle was built elsewhere. `files` are
    the bundle's digests by name, `release`, `package` and `engine_sha256` what ran on the board, `pins` the locked
    version of every requirement, `figures` by metric, `gates` what each had to be, `layers` what the build's check
    found of each: least cosine of a row and worst error, by part and stage ("layer 0 prefill"). A green night with a
    `reason` was not judged. `blame` is board or code where a red night's health check tells, `sensors` least, median
    and most of each while it measured. `flaky` is what the network or the board did to the first try, where there was a
    second; `quarantined` what was red and did not count, with owner and end date (ci/nightly/quarantine.py); `culprit`
    the commit that a bisection named, with its subject.
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
        """Green, by gates."""
        return self.green and not self.reason


class History(NamedTuple):
    """The nights in the order they were held, and a sentence for every line that could not be read."""

    nights: tuple[Night, ...]
    faults: tuple[str, ...]


def place(folder: Path, board: str, model: str) -> Path:
    """The file of a board and a model. Raises BadInput for names that are none."""
    for name in (board, model):
        if not NAME.fullmatch(name):
            raise BadInput(f"{name!a:.60} is no name of a board or a model")
    return folder / board / f"{model}.jsonl"


def append(folder: Path, night: Night) -> Path:
    """Adds a night and brings it to the disk; two writers at once both get their line. Returns the file.

    Raises BadInput when it cannot be written, and for a night that would be left out when it is read.
    """
    file = place(folder, night.board, night.model)
    line = json.dumps({"schema": SCHEMA, **dataclasses.asdict(night)}, sort_keys=True).encode()
    try:
        _night(line, night.board, night.model)
    except ValueError as error:
        raise BadInput(f"this night is not added to {file}, where it would be left out: {error}") from None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a+b", buffering=0) as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            size = stream.seek(0, os.SEEK_END)
            torn = size > 0 and os.pread(stream.fileno(), 1, size - 1) != b"\n"
            data = (b"\n" if torn else b"") + line + b"\n"
            if stream.write(data) != len(data):
                raise OSError("the disk took only a part of the line")
            os.fsync(stream.fileno())
    except OSError as error:
        raise BadInput(f"cannot add to {file}: {error.strerror or error}") from None
    return file


def require_writable(folder: Path, board: str, model: str) -> None:
    """Raises BadInput when a night could not be added."""
    file = place(folder, board, model)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "ab"):
            pass
    except OSError as error:
        raise BadInput(f"cannot add to {file}: {error.strerror or error}\nName another folder: --history") from None


def read(folder: Path, board: str, model: str) -> History:
    """Every night of a board and a model; none where there is no file. Raises BadInput when it cannot be read."""
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
        raise BadInput(f"{file} has more than {LARGEST >> 20} MB\nMove its oldest lines into a file elsewhere.")
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line:
            continue
        try:
            nights.append(_night(line, board, model))
        except ValueError as error:
            faults.append(f"{file.name} line {number} is left out: {error}")
    return History(tuple(nights), tuple(faults))


def of_board(folder: Path, board: str) -> tuple[Night, ...]:
    """The nights of a board, of whatever model, in the order they were held; unreadable lines are left out."""
    files = sorted((folder / board).glob("*.jsonl"))
    models = [file.stem for file in files if NAME.fullmatch(file.stem)]
    found = [night for model in models for night in read(folder, board, model).nights]
    return tuple(sorted(found, key=lambda night: night.started))


def last_green(nights: Iterable[Night]) -> Night | None:
    """The last that was judged, and found good."""
    return next((night for night in reversed(tuple(nights)) if night.judged_green), None)


def measured(nights: Iterable[Night], maker: str) -> list[Night]:
    """Those of a maker that got as far as figures, whatever the gates said of them."""
    return [night for night in nights if night.maker == maker and night.figures]


def _night(line: bytes, board: str, model: str) -> Night:
    """Raises ValueError with what is wrong."""
    if len(line) > LONGEST:
        raise ValueError(f"it has {len(line)} bytes")
    try:
        values = strict_json.loads(line)
    except json.JSONDecodeError:
        seen = line[:30].decode("ascii", "backslashreplace")
        raise ValueError(f"it is no JSON, as after a crash: {seen!r}") from None
    if not isinstance(values, dict) or values.pop("schema", None) != SCHEMA:
        raise ValueError(f"it is no night of schema {SCHEMA}")
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
    """What is wrong with an entry of a night; empty where nothing is."""
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

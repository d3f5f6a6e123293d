"""The nights that were held, one JSON object a line, in FOLDER/BOARD/MODEL.jsonl. Lines are added, never changed.

A line that a crash tore is left where it is and reported; the next night begins on a line of its own.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from axrun.errors import BadInput
from ci.nightly import metrics
from ci.nightly.gate import NAME

SCHEMA = 1
LONGEST = 1 << 20  # bytes of a line
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

    Raises BadInput when it cannot be written.
    """
    file = place(folder, night.board, night.model)
    line = json.dumps({"schema": SCHEMA, **dataclasses.asdict(night)}, allow_nan=False, sort_keys=True).encode()
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
        data = file.read_bytes() if file.exists() else b""
    except OSError as error:
        raise BadInput(f"cannot read {file}: {error.strerror or error}") from None
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line:
            continue
        try:
            nights.append(_night(line))
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


def _night(line: bytes) -> Night:
    """Raises ValueError with what is wrong."""
    if len(line) > LONGEST:
        raise ValueError(f"it has {len(line)} bytes")
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        seen = line[:30].decode("ascii", "backslashreplace")
        raise ValueError(f"it is no JSON, as after a crash: {seen!r}") from None
    if not isinstance(values, dict) or values.pop("schema", None) != SCHEMA:
        raise ValueError(f"it is no night of schema {SCHEMA}")
    known = {entry.name for entry in dataclasses.fields(Night)}
    if not NEEDED <= set(values) <= known:
        raise ValueError(f"it has {', '.join(sorted(map(str, values)))[:200]}")
    for name, value in values.items():
        if not _fits(name, value):
            raise ValueError(f"its {name} is {value!a:.40}")
    return Night(**values)


def _fits(name: str, value: Any) -> bool:
    if name == "seconds":
        return _is_number(value)
    if name == "figures":
        return isinstance(value, dict) and all(_is_figure(key, entry) for key, entry in value.items())
    if name == "layers":
        return isinstance(value, dict) and all(_is_pair(entry) for entry in value.values())
    if name == "sensors":
        return isinstance(value, dict) and all(
            isinstance(entry, list) and all(map(_is_number, entry)) for entry in value.values()
        )
    if name == "handed_in":
        return isinstance(value, bool)
    if name == "gates" and not (isinstance(value, dict) and all(_is_figure(key, 0.0) for key in value)):
        return False
    if name in ("files", "pins", "machine", "gates", "quarantined"):
        return isinstance(value, dict) and all(isinstance(entry, str) for entry in value.values())
    return isinstance(value, str) and re.fullmatch(FORMS.get(name, "(?s).{0,10000}"), value) is not None


def _is_figure(name: str, value: Any) -> bool:
    try:
        metrics.find(name)
    except BadInput:
        return False
    return _is_number(value)


def _is_pair(value: Any) -> bool:
    return _are_numbers(value) and len(value) == 2


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

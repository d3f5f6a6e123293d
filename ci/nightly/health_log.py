"""The log of a board's health checks: one JSON object per line in HISTORY/BOARD/health/checks.jsonl.

The baseline of a check is the median of the same board's last healthy checks.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from axrun.errors import BadInput
from ci.device import strict_json
from ci.nightly.gate import NAME

BOARD = "board: "  # prefix of the reason if the board made a night red
ADVICE = (
    "No new code ran. Check the board's power, cooling, disk and kernel log, restart it, then: "
    "invoke board.health --board {board} (--renew sends the known-good bundle again)"
)
HEALTHY, FIRST, UNHEALTHY = "healthy", "first", "ill"  # as stored in CHECKS
CHECKS = "checks.jsonl"
SCHEMA, LONGEST = 1, 1 << 16
PAST, FEWEST = 10, 3  # most and fewest healthy checks of a baseline
SLOWER = 0.15  # tolerance of speed: this share, or twice the spread
# Tolerance of free memory: a share and a number of bytes; a check must exceed both to fail.
MISSING = {"memory": (0.1, 64 << 20), "cmm": (0.02, 4 << 20)}
LEAST_DISK = 256 << 20  # bytes: a package, a model and a transfer in progress
SOON = 10  # warn if the disk will be full within this many checks
NOUNS = {"memory": "memory", "cmm": "CMM", "disk": "disk"}
MB = 1e6


@dataclass(frozen=True)
class Check:
    """One health check: `word` is HEALTHY, FIRST (no baseline yet) or UNHEALTHY.

    `kit` is the release of the known-good bundle, `tokens` its answer, `speed` in ms and tokens per second, `sizes` the
    free bytes.
    """

    started: str
    word: str
    kit: str
    tokens: tuple[int, ...] = ()
    speed: Mapping[str, float] = field(default_factory=dict)
    sizes: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def reason(self, board: str) -> str:
        """The reason for a night to stop here, and the advice on the next line."""
        more = f" (and {len(self.faults) - 1} more)" if len(self.faults) > 1 else ""
        return f"{BOARD}{self.faults[0]}{more}\n{ADVICE.format(board=board)}"

    def lines(self) -> Iterator[str]:
        """The check in lines for a console."""
        speed = ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in self.speed.items())
        sizes = ", ".join(f"{NOUNS[name]} {value / MB:.0f} MB" for name, value in self.sizes.items())
        word = "unhealthy" if self.word == UNHEALTHY else self.word
        yield f"{word}: {len(self.tokens)} tokens; {speed or 'no speed'}; free: {sizes or 'unknown'}"
        yield from (f"{name}: {value}" for name, value in self.versions.items())
        yield from (f"note: {note}" for note in self.notes)


def place(history: Path, board: str) -> Path:
    """The folder of a board's health log. Raises BadInput for an invalid name."""
    if not NAME.fullmatch(board):
        raise BadInput(f"{board!a:.60} is not a valid name of a board")
    return history / board / "health"


def append(folder: Path, check: Check) -> None:
    """Raises BadInput when it cannot be written."""
    line = json.dumps({"schema": SCHEMA, **dataclasses.asdict(check)}, allow_nan=False, sort_keys=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / CHECKS).open("a+b") as stream:
            size = stream.seek(0, os.SEEK_END)
            torn = size > 0 and os.pread(stream.fileno(), 1, size - 1) != b"\n"
            stream.write((b"\n" if torn else b"") + line.encode() + b"\n")
    except OSError as error:
        raise BadInput(f"cannot add to {folder / CHECKS}: {error.strerror or error}") from None


def read(folder: Path) -> list[Check]:
    """Every check, oldest first; invalid lines are skipped. Raises BadInput for an unreadable file."""
    file = folder / CHECKS
    try:
        lines = file.read_bytes().split(b"\n") if file.exists() else []
    except OSError as error:
        raise BadInput(f"cannot read {file}: {error.strerror or error}") from None
    return [found for line in lines if line and (found := _check(line))]


def worse(before: Sequence[Check], found: Check) -> Iterator[str]:
    """What is worse than at the last healthy checks of the same board."""
    for name, (share, least) in MISSING.items():
        past = _past(before, "sizes", name)
        if len(past) < FEWEST or name not in found.sizes:
            continue
        usual, now = statistics.median(past), found.sizes[name]
        if usual - now > max(share * usual, least):
            yield (
                f"free {NOUNS[name]} dropped to {now / MB:.0f} MB; the last {len(past)} checks had {usual / MB:.0f} MB"
            )
    if found.sizes.get("disk", math.inf) < LEAST_DISK:
        yield f"its disk is full: {found.sizes['disk'] / MB:.0f} MB are free, a release needs {LEAST_DISK / MB:.0f} MB"
    rate = "decode_tokens_per_s"
    same = [check for check in before if check.kit == found.kit]
    past = _past(same, "speed", rate)
    if len(past) >= FEWEST and rate in found.speed:
        usual, now = statistics.median(past), found.speed[rate]
        if usual - now > max(SLOWER * usual, 2 * (max(past) - min(past))):
            yield (
                f"it is slow: {now:.1f} token/s with the known-good bundle; the last {len(past)} checks had {usual:.1f}"
            )


def trends(before: Sequence[Check], found: Check) -> Iterator[str]:
    """Early warnings: a disk that is filling up, a board that became faster."""
    past = [*_past(before, "sizes", "disk")[-4:], found.sizes.get("disk", math.nan)]
    falls = len(past) == 5 and all(now < was for was, now in itertools.pairwise(past))
    if falls:
        each = (past[0] - past[-1]) / (len(past) - 1)
        left = (past[-1] - LEAST_DISK) / each
        if left < SOON:
            yield f"its disk fills by {each / MB:.0f} MB per check: full after {max(0, math.floor(left))} more checks"
    rate = "decode_tokens_per_s"
    rates = _past([check for check in before if check.kit == found.kit], "speed", rate)
    if len(rates) >= FEWEST and rate in found.speed:
        usual, now = statistics.median(rates), found.speed[rate]
        if now - usual > max(SLOWER * usual, 2 * (max(rates) - min(rates))):
            yield f"the known-good bundle became faster: {now:.1f} token/s, before {usual:.1f}; did clocks change?"


def changes(before: Sequence[Check], found: Check) -> Iterator[str]:
    """Versions that changed since the last check."""
    if not before:
        return
    was = before[-1].versions
    for name in sorted(was.keys() | found.versions.keys()):
        if was.get(name) != found.versions.get(name):
            yield f"the board's {name} is {found.versions.get(name, 'gone')}, was {was.get(name, 'unknown')}"


def _past(before: Sequence[Check], table: str, name: str) -> list[float]:
    """The values of a figure in `table` (`speed` or `sizes`) at the last healthy checks."""
    good = [getattr(check, table) for check in before if check.word != UNHEALTHY]
    return [values[name] for values in good if name in values][-PAST:]


def _check(line: bytes) -> Check | None:
    """None for an invalid line."""
    if len(line) > LONGEST:
        return None
    try:
        values = strict_json.loads(line)
        if (
            not isinstance(values, dict)
            or values.pop("schema") != SCHEMA
            or values.keys() != {entry.name for entry in dataclasses.fields(Check)}
        ):
            return None
        for name in ("speed", "sizes"):
            values[name] = {str(key): float(value) for key, value in values[name].items()}
        values["versions"] = {str(key): str(value) for key, value in values["versions"].items()}
        values["tokens"] = tuple(map(int, values["tokens"]))
        values |= {name: tuple(map(str, values[name])) for name in ("faults", "notes")}
        return Check(**values)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None

"""The health of a board over time: checks, one JSON object a line, in HISTORY/BOARD/health/checks.jsonl.

What a check is held against is what the same board had at its last good ones.
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

BOARD = "board: "  # how the reason of a night begins that is red because of the board
ADVICE = (
    "Nothing new ran. Look at the board's power, cooling, disk and kernel log, restart it, then: "
    "invoke board.health --board {board} (--renew sends the known bundle anew)"
)
HEALTHY, FIRST, ILL = "healthy", "first", "ill"
CHECKS = "checks.jsonl"
SCHEMA, LONGEST = 1, 1 << 16
PAST, FEWEST = 10, 3  # good checks that are compared with
SLOWER = 0.15  # the least share that speed must fall by, or twice its spread
# The least share and the least bytes that must be missing.
MISSING = {"memory": (0.1, 64 << 20), "cmm": (0.02, 4 << 20)}
LEAST_DISK = 256 << 20  # bytes: a package, a model, and what is on its way
SOON = 10  # checks, until a disk that fills up is full
NOUNS = {"memory": "memory", "cmm": "CMM", "disk": "disk"}
MB = 1e6


@dataclass(frozen=True)
class Check:
    """`word` is HEALTHY, FIRST (nothing to compare with) or ILL, `kit` the release of the known bundle.

    `tokens` it answered with, `speed` in ms and tokens a second, `sizes` are bytes that were free.
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
        """Why a night ends here, and what to do."""
        more = f" (and {len(self.faults) - 1} more)" if len(self.faults) > 1 else ""
        return f"{BOARD}{self.faults[0]}{more}\n{ADVICE.format(board=board)}"

    def told(self) -> Iterator[str]:
        """For a console."""
        speed = ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in self.speed.items())
        sizes = ", ".join(f"{NOUNS[name]} {value / MB:.0f} MB" for name, value in self.sizes.items())
        yield f"{self.word}: {len(self.tokens)} tokens; {speed or 'no speed'}; free: {sizes or 'not told'}"
        yield from (f"{name}: {value}" for name, value in self.versions.items())
        yield from (f"note: {note}" for note in self.notes)


def place(history: Path, board: str) -> Path:
    """The folder of a board's health. Raises BadInput for a name that is none."""
    if not NAME.fullmatch(board):
        raise BadInput(f"{board!a:.60} is no name of a board")
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
    """Every check, oldest first; lines that are none are left out. Raises BadInput when it cannot be read."""
    file = folder / CHECKS
    try:
        lines = file.read_bytes().split(b"\n") if file.exists() else []
    except OSError as error:
        raise BadInput(f"cannot read {file}: {error.strerror or error}") from None
    return [found for line in lines if line and (found := _check(line))]


def worse(before: Sequence[Check], found: Check) -> Iterator[str]:
    """Where a check is worse than the last good ones of the same board."""
    for name, (share, least) in MISSING.items():
        past = _past(before, "sizes", name)
        if len(past) < FEWEST or name not in found.sizes:
            continue
        usual, now = statistics.median(past), found.sizes[name]
        if usual - now > max(share * usual, least):
            yield (
                f"{NOUNS[name]} does not come back: {now / MB:.0f} MB are free, "
                f"the last {len(past)} checks had {usual / MB:.0f} MB"
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
                f"it is slow: the known bundle makes {now:.1f} token/s, at the last {len(past)} checks it made "
                f"{usual:.1f}"
            )


def trends(before: Sequence[Check], found: Check) -> Iterator[str]:
    """What is not wrong yet: a disk that fills up, a board that got faster."""
    past = [*_past(before, "sizes", "disk")[-4:], found.sizes.get("disk", math.nan)]
    falls = len(past) == 5 and all(now < was for was, now in itertools.pairwise(past))
    if falls:
        each = (past[0] - past[-1]) / (len(past) - 1)
        left = (past[-1] - LEAST_DISK) / each
        if left < SOON:
            yield f"its disk fills up by {each / MB:.0f} MB a check: full in {max(0, math.floor(left))} more"
    rate = "decode_tokens_per_s"
    rates = _past([check for check in before if check.kit == found.kit], "speed", rate)
    if len(rates) >= FEWEST and rate in found.speed:
        usual, now = statistics.median(rates), found.speed[rate]
        if now - usual > max(SLOWER * usual, 2 * (max(rates) - min(rates))):
            yield f"the known bundle is faster than it was: {now:.1f} token/s, {usual:.1f} before: other clocks?"


def changes(before: Sequence[Check], found: Check) -> Iterator[str]:
    """Versions that are others than at the last check."""
    if not before:
        return
    was = before[-1].versions
    for name in sorted(was.keys() | found.versions.keys()):
        if was.get(name) != found.versions.get(name):
            yield f"the board's {name} is {found.versions.get(name, 'gone')}, was {was.get(name, 'not told')}"


def _past(before: Sequence[Check], table: str, name: str) -> list[float]:
    """A figure of the last good checks, of their `speed` or `sizes`."""
    good = [getattr(check, table) for check in before if check.word != ILL]
    return [values[name] for values in good if name in values][-PAST:]


def _check(line: bytes) -> Check | None:
    """None for what is no check."""
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

"""Strict JSON for untrusted files: of a board, a history, a killed run. Anything unusual is a ValueError.

Python's parser accepts NaN and integers of any length, on which float(), math.isfinite() and formatting fail later, in
unexpected places.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

MOST = 2.0**63  # of any number: sizes in bytes are the largest
LONGEST = 64 << 20  # bytes of a file


def loads(text: str | bytes) -> Any:
    """json.loads that raises ValueError for NaN, infinities, numbers beyond 64 bits, and too deep nesting."""
    try:
        return json.loads(text, parse_int=_integer, parse_float=_float, parse_constant=_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read(file: Path, most: int = LONGEST) -> dict[str, Any]:
    """The JSON object in a file. Raises OSError, or ValueError, also for more than `most` bytes."""
    with file.open("rb") as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it has more than {most} bytes")
    found = loads(data)
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return found


def read_or_nothing(file: Path, most: int = LONGEST) -> dict[str, Any]:
    """As `read`, but empty for a missing or invalid file."""
    try:
        return read(file, most)
    except (OSError, ValueError):
        return {}


def plain(value: Any) -> Any:
    """The value with numbers that `loads` would refuse turned into text, so that the file stays readable."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not abs(value) < MOST:
        return f"{value!a:.40}" if isinstance(value, float) else f"an integer of {value.bit_length()} bits"
    return value


def _integer(text: str) -> int:
    if len(text) > 20 or not abs(int(text)) < MOST:
        raise ValueError(f"it has the number {text[:20]}... of {len(text)} characters")
    return int(text)


def _float(text: str) -> float:
    if not abs(float(text)) < MOST:
        raise ValueError(f"it has the number {text[:40]}")
    return float(text)


def _constant(text: str) -> NoReturn:
    raise ValueError(f"it has {text}, which is not a JSON number")

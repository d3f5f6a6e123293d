"""JSON that somebody else wrote: a board, a history, a run that was killed. What does not fit is a ValueError.

Python's own reader takes NaN and integers of any length, on which float(), math.isfinite() and formatting fail later,
where nobody expects it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

MOST = 2.0**63  # of any number: sizes in bytes are the largest
LONGEST = 64 << 20  # bytes of a file


def loads(text: str | bytes) -> Any:
    """As json.loads. Raises ValueError for NaN, infinities, numbers beyond 64 bits, and for what is nested too deep."""
    try:
        return json.loads(text, parse_int=_integer, parse_float=_float, parse_constant=_constant)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read(file: Path, most: int = LONGEST) -> dict[str, Any]:
    """The object that a file holds. Raises OSError, and ValueError for one of more than `most` bytes too."""
    with file.open("rb") as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it has more than {most} bytes")
    found = loads(data)
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def read_or_nothing(file: Path, most: int = LONGEST) -> dict[str, Any]:
    """As `read`; empty where there is none that can be read, as of a run that did not get so far."""
    try:
        return read(file, most)
    except (OSError, ValueError):
        return {}


def plain(value: Any) -> Any:
    """A value whose numbers `loads` takes: others become text, so that one of them does not make a file unreadable."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not abs(value) < MOST:
        return f"{value!a:.40}" if isinstance(value, float) else f"an integer of {value.bit_length()} bits"
    return value


def _integer(text: str) -> int:
    if len(text) > 20 or not abs(int(text)) < MOST:
        raise ValueError(f"it has the number {text[:20]}..., of {len(text)} characters")
    return int(text)


def _float(text: str) -> float:
    if not abs(float(text)) < MOST:
        raise ValueError(f"it has the number {text[:40]}")
    return float(text)


def _constant(text: str) -> NoReturn:
    raise ValueError(f"it has {text}, which is no number")

"""A TOML file of bounded size, and where in it something is: tomllib keeps no places, and errors name the line."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from axrun.errors import BadInput

LONGEST = 1 << 20  # bytes of a file
MOST = 2**63  # of an integer: TOML's have 64 bits, tomllib's any length

HEADER = re.compile(r"\s*\[{1,2}\s*([^\[\]]+?)\s*\]{1,2}\s*(#.*)?$")
KEY = re.compile(r'\s*"?([A-Za-z0-9_-]+)"?\s*=')


def read(file: Path) -> tuple[str, dict[str, Any]]:
    """The text of a file and what it says. Raises BadInput."""
    try:
        data = file.read_bytes()
        if len(data) > LONGEST:
            raise BadInput(f"{file} has {len(data)} bytes, expected at most {LONGEST}")
        text = data.decode("utf-8")
        content = tomllib.loads(text)
    except OSError as error:
        raise BadInput(f"cannot read {file}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is a ValueError, as an integer of 5000 digits is
        why = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise BadInput(f"{file} is no TOML: {why[:200]}") from None
    for key, value in _integers(content):
        if not abs(value) < MOST:
            seen = f"an integer of {value.bit_length()} bits"
            raise BadInput(f"{file} line {_line_of(text, key)}: {key} is {seen}, expected 64 at most")
    return text, content


def line(text: str, key: str = "", value: object = None, *, table: str = "", index: int = 0, nth: int = 0) -> int:
    """The line, from 1, of a key in a table ("" is above all tables), or of the `nth` time a value stands there.

    `index` counts tables of the same name, as of [[exclude]]. What is not found is told by the line of what holds it.
    """
    wanted = value_pattern(value)
    current, seen, held, counted = "", 0, 1, 0
    inside, of_key = table == "", False
    for number, content in enumerate(text.splitlines(), 1):
        if header := HEADER.match(content):
            current = header[1]
            inside = current == table and seen == index
            seen += current == table
            of_key = False
            held = number if inside else held
        elif found := KEY.match(content):
            of_key = inside and found[1] == key
            held = number if of_key else held
        if not of_key:
            continue
        if wanted is None:
            return number
        for _ in wanted.finditer(content):
            if counted == nth:
                return number
            counted += 1
    return held


def value_pattern(value: object) -> re.Pattern[str] | None:
    """How a value may be written; None for what is looked for by its key alone."""
    if isinstance(value, str):
        return re.compile(f"{re.escape(json.dumps(value, ensure_ascii=False))}|'{re.escape(value)}'")
    return None


def _integers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Every integer, with the key it stands under."""
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from _integers(entry, name)
    elif isinstance(value, list):
        for entry in value:
            yield from _integers(entry, key)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield key, value


def _line_of(text: str, key: str) -> int:
    """The first line of a key, in whatever table; 1 where it is not found."""
    for number, content in enumerate(text.splitlines(), 1):
        found = KEY.match(content)
        if found and found[1] == key:
            return number
    return 1

"""Reads bounded TOML files, and finds the line of a key or value for error messages (tomllib keeps no positions)."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from axrun.errors import BadInput

LONGEST = 1 << 20  # bytes of a file
MOST = 2**63  # TOML integers have 64 bits; tomllib accepts any length

HEADER = re.compile(r"\s*\[{1,2}\s*([^\[\]]+?)\s*\]{1,2}\s*(#.*)?$")
KEY = re.compile(r'\s*"?([A-Za-z0-9_-]+)"?\s*=')


def read(file: Path) -> tuple[str, dict[str, Any]]:
    """The text of a file and its parsed content. Raises BadInput."""
    try:
        data = file.read_bytes()
        if len(data) > LONGEST:
            raise BadInput(f"{file} has {len(data)} bytes, expected at most {LONGEST}")
        text = data.decode("utf-8")
        content = tomllib.loads(text)
    except OSError as error:
        raise BadInput(f"cannot read {file}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, or an integer of 5000 digits
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise BadInput(f"{file} is not valid TOML: {why[:200]}") from None
    for key, value in _integers(content):
        if not abs(value) < MOST:
            seen = f"an integer of {value.bit_length()} bits"
            raise BadInput(f"{file} line {_line_of(text, key)}: {key} is {seen}, expected 64 at most")
    return text, content


def line(text: str, key: str = "", value: object = None, *, table: str = "", index: int = 0, nth: int = 0) -> int:
    """The 1-based line of a key in a table ("" is the top level), or of the `nth` occurrence of a value under the key.

    `index` counts tables of the same name, such as [[exclude]]. If not found, the line of the enclosing key or table.
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
    """A pattern of the ways to write a value; None to search by key only."""
    if isinstance(value, str):
        return re.compile(f"{re.escape(json.dumps(value, ensure_ascii=False))}|'{re.escape(value)}'")
    return None


def _integers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Every integer with its key."""
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from _integers(entry, name)
    elif isinstance(value, list):
        for entry in value:
            yield from _integers(entry, key)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield key, value


def _line_of(text: str, key: str) -> int:
    """The first line of a key in any table; 1 if not found."""
    for number, content in enumerate(text.splitlines(), 1):
        found = KEY.match(content)
        if found and found[1] == key:
            return number
    return 1

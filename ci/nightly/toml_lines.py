"""A TOML file of bounded size, and where in it something is: tomllib keeps no places, and errors name the line."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from axrun.errors import BadInput

LONGEST = 1 << 20  # bytes of a file

HEADER = re.compile(r"\s*\[{1,2}\s*([^\[\]]+?)\s*\]{1,2}\s*(#.*)?$")
KEY = re.compile(r'\s*"?([A-Za-z0-9_-]+)"?\s*=')


def read(file: Path) -> tuple[str, dict[str, Any]]:
    """The text of a file and what it says. Raises BadInput."""
    try:
        data = file.read_bytes()
        if len(data) > LONGEST:
            raise BadInput(f"{file} has {len(data)} bytes, expected at most {LONGEST}")
        text = data.decode("utf-8")
        return text, tomllib.loads(text)
    except OSError as error:
        raise BadInput(f"cannot read {file}: {error.strerror or error}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadInput(f"{file}: {error}") from None


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

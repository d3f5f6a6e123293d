"""Reads JSON files of a checkpoint, which are untrusted: one object without duplicate keys."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from axc.checkpoints.folder import refuse_lfs_pointer
from axrun.errors import BadInput

MAX_CONFIG = 1 << 20  # bytes


def read_config_json(path: Path) -> dict[str, Any]:
    """The keys of a config.json. Raises BadInput."""
    if path.is_file() and path.stat().st_size > MAX_CONFIG:
        raise BadInput(f"{path} has {path.stat().st_size} bytes; expected at most {MAX_CONFIG}")
    return read_json(path, _once)


def read_json(path: Path, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint; `pairs` makes its objects. Raises BadInput."""
    try:
        values = json.loads(path.read_text("utf-8"), object_pairs_hook=pairs)
    except FileNotFoundError:
        raise BadInput(f"{path} is missing\nGive the folder of a Hugging Face checkpoint.") from None
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ValueError):
            refuse_lfs_pointer(path)
        raise BadInput(f"cannot read {path}: {str(error)[:200]}") from None
    if not isinstance(values, dict):
        raise BadInput(f"{path} holds a {type(values).__name__}, expected a JSON object")
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object without duplicate keys. Raises ValueError."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values and values[key] != value:
            raise ValueError(f"{key:.60} is given twice: {values[key]!r:.40} and {value!r:.40}")
        values[key] = value
    return values

"""How the fields of request bodies are described, in JSON Schema: optional, ignored, refused, with limits.

`x-refused` marks a field that is known but not supported; see `axrun.serve.validate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Fields = dict[str, dict[str, Any]]

MAX_CHOICES = 64  # prompts times n in one request
MAX_N = 16
MAX_STOPS = 16
MAX_STOP_IDS = 64
MAX_TOOLS = 128
MAX_LENGTH = (1 << 31) - 1
NO_LIMIT = -1  # value of a token limit
IGNORED = "Accepted and ignored."


def optional(kind: str, text: str = "", **limits: Any) -> dict[str, Any]:
    return {"type": [kind, "null"], "description": text, **limits}


def refused(kind: str, why: str = "leave it out", **off: Any) -> dict[str, Any]:
    """A field that is known but not supported; `off` are the limits of values without effect."""
    return {"type": [kind, "null"], "description": "Not supported.", "x-refused": why, **off}


def ignored(*kinds: str) -> dict[str, Any]:
    return {"type": [*kinds, "null"], "description": IGNORED}


# what OpenAI's client adds to the answers that it has parsed, and some programs send back in the history
PARSED = ignored("object", "array", "string", "number", "boolean")


def neutral(value: Any) -> dict[str, Any]:
    """A field of other servers, with the only value accepted here: the one that has no effect."""
    kind = "boolean" if isinstance(value, bool) else "number"
    return refused(kind, enum=[value, None])


def limit(text: str, least: int) -> dict[str, Any]:
    """A number of tokens, or -1 for no limit."""
    return {
        "anyOf": [
            {"type": "null"},
            {"type": "integer", "minimum": least, "maximum": MAX_LENGTH},
            {"type": "integer", "enum": [NO_LIMIT]},
        ],
        "title": f"a whole number of at least {least}, or {NO_LIMIT} for no limit",
        "description": text,
    }


def request(fields: Fields, models: Sequence[str]) -> dict[str, Any]:
    """The schema of a request body; `models` are the accepted model names, the first one is the default."""
    required = [name for name, schema in fields.items() if "null" not in _types(schema)]
    properties = {"model": {"type": ["string", "null"], "enum": [*models, None]}, **fields}
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


def _types(schema: dict[str, Any]) -> list[str]:
    kinds = [option["type"] for option in schema.get("anyOf", [schema])]
    return [name for kind in kinds for name in (kind if isinstance(kind, list) else [kind])]

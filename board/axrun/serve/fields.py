"""The table of request fields in docs/serve.md, generated from the schemas that validate requests.

`python -m axrun.serve.fields` prints it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from axrun.serve import embedding, messages, schema
from axrun.serve.field_kinds import IGNORED, Fields
from axrun.serve.ollama import embed
from axrun.serve.ollama import fields as ollama
from axrun.serve.responses.fields import FIELDS as RESPONSES
from axrun.serve.responses.fields import ITEMS

ITEM_PLACES = [f"{item['properties']['type']['enum'][0]} item" for item in ITEMS]
PLACES: tuple[tuple[str, Fields], ...] = (
    ("chat", schema.CHAT),
    ("completions", schema.COMPLETION),
    ("responses", RESPONSES),
    ("embeddings", embedding.FIELDS),
    ("api/chat", ollama.CHAT),
    ("api/generate", ollama.GENERATE),
    ("api/embed", embed.FIELDS),
    ("options", ollama.OPTIONS),
    ("message", messages.MESSAGE_FIELDS),
    ("part", messages.TEXT_PART["properties"]),
    *zip(ITEM_PLACES, (item["properties"] for item in ITEMS)),
    ("api/chat message", ollama.MESSAGE["properties"]),
)
HEAD = {
    "Supported": ["| field | in | meaning |", "|---|---|---|"],
    "Accepted without effect": ["| field | in |", "|---|---|"],
    "Refused unless off": ["| field | in | off |", "|---|---|---|"],
}
LIMITS = {"minimum": "from", "maximum": "to"}


def tables() -> dict[str, list[str]]:
    """Markdown lines by heading: fields that are supported, ignored, and refused unless turned off."""
    rows: dict[tuple[str, str], list[str]] = {}
    for place, fields in PLACES:
        for name, field in fields.items():
            kind, cells = _row(field)
            rows.setdefault((kind, f"| `{name}` | {{}}{''.join(f' | {cell}' for cell in cells)} |"), []).append(place)
    lines = {kind: list(head) for kind, head in HEAD.items()}
    for (kind, row), places in rows.items():
        listed = ", ".join(dict.fromkeys(places)).replace(", ".join(ITEM_PLACES), "item")
        lines[kind].append(row.replace("{}", listed, 1))
    return lines


def _row(field: Mapping[str, Any]) -> tuple[str, list[str]]:
    text = field.get("description", "")
    if field.get("x-refused"):
        return "Refused unless off", [", ".join(_off(field))]
    if text == IGNORED:
        return "Accepted without effect", []
    limits = " ".join(f"{words} {field[key]}" for key, words in LIMITS.items() if key in field)
    sentences = [text, *(words[:1].upper() + words[1:] + "." for words in (field.get("title", ""), limits) if words)]
    return "Supported", [" ".join(filter(None, sentences))]


def _off(field: Mapping[str, Any]) -> Iterator[str]:
    yield "absent"
    yield "`null`"
    for value in field.get("enum", ()):
        if value is not None:
            yield f"`{json.dumps(value)}`"
    if field.get("maxItems") == 0:
        yield "`[]`"
    if field.get("maxProperties") == 0:
        yield "`{}`"
    if field.get("maxLength") == 0:
        yield '`""`'
    if field.get("maximum") is not None:
        yield f"`{field['maximum']}`"
    if "items" in field:
        yield f"`{json.dumps(field['items']['enum'])}`"
    for name, inner in field.get("properties", {}).items():
        yield from (f"`{json.dumps({name: value})}`" for value in inner["enum"])


if __name__ == "__main__":
    for heading, lines in tables().items():
        print(f"### {heading}\n\n" + "\n".join(lines) + "\n")

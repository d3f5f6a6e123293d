"""The grammar of tool calls, in llguidance's Lark syntax: every call is of a given tool and has valid arguments."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from axrun.sampling.grammar import rule
from axrun.text.tokenizer import Tokenizer
from axrun.text.tool_formats import Format, read_named, read_python

Tool = Mapping[str, Any]  # {"name", "parameters"}


def grammar(
    format: Format, tools: Sequence[Tool], tokenizer: Tokenizer, single: bool, instead: Mapping[str, Any] | None = None
) -> str:
    """At least one call, or with `single` exactly one; or JSON that is valid under `instead`.

    Raises BadInput for a schema that cannot be enforced.
    """
    begin, end = (_mark(mark, tokenizer) for mark in (format.begin, format.end))
    lines = [f"call: {' | '.join(f'tool{number}' for number in range(len(tools)))}"]
    for number, tool in enumerate(tools):
        lines.append(f"tool{number}: {_tool(format, tool)}")
    space = _text(format.space)
    if format.read is read_python and "```" not in format.begin:
        wrapped = f'{space} "```python\\n" call "\\n```" {space}'
    else:
        wrapped = f"{space} call {space}"
    if format.end or format.read is read_named:
        section = f"{begin} {wrapped} {end}"
        lines.append(f"section: {section}")
        lines.append("calls: section" + ("" if single else (' ("\\n" section)*' if format.end else " section*")))
    elif format.begin:
        lines.append(f'calls: {begin} "[" call' + ("" if single else ' (", " call)*') + ' "]"')
    else:
        lines.append("calls: call" + ("" if single else ' | "[" call (", " call)* "]"'))
    lines.append("start: calls" + ("" if instead is None else f" | answer\nanswer: {rule(instead)}"))
    return "\n".join(lines)


def _tool(format: Format, tool: Tool) -> str:
    name, schema = tool["name"], {"type": "object", "properties": {}, **tool["parameters"]}
    if format.read is read_named:
        return f'{_text(name)} "[ARGS]" {rule(schema)}'
    if format.read is not read_python:
        whole = {
            "type": "object",
            "properties": {"name": {"const": name}, format.key: schema},
            "required": ["name", format.key],
            "additionalProperties": False,
        }
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        return rule({**whole, **shared})
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    arguments = []
    for key, value in schema["properties"].items():  # Python allows a comma after the last argument
        value = value if isinstance(value, Mapping) else {}
        written = f'{_text(key + "=")} {rule({**shared, **value})} ", "'
        arguments.append(f"({written})" + ("" if key in schema.get("required", ()) else "?"))
    return " ".join([_text(name + "("), *arguments, '")"'])


def _mark(text: str, tokenizer: Tokenizer) -> str:
    """A mark as a special token if it is one."""
    for number in tokenizer.special_ids:
        if tokenizer.added_tokens[number].content == text:
            return f"<[{number}]>"
    return _text(text)


def _text(text: str) -> str:
    return json.dumps(text) if text else ""

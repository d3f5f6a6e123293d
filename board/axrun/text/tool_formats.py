"""How models write tool calls: a table of formats, and how to read and spell the calls in them.

A call that cannot be read is not a call: it stays text. https://huggingface.co/docs/transformers/chat_extras
"""

from __future__ import annotations

import ast
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from axrun.text.template import PROBE, ChatTemplate

LONGEST = 1 << 16  # characters of calls in one answer
ARGUMENTS = ("arguments", "parameters", "args")  # names of the arguments of a call in JSON
CONSTANTS = {"true": True, "false": False, "null": None}  # JSON's names among Python's literals


@dataclass(frozen=True)
class Call:
    """A call of a function. Arguments are a JSON object."""

    name: str
    arguments: dict[str, Any]

    def json(self) -> str:
        """The arguments as JSON."""
        return json.dumps(self.arguments, ensure_ascii=False)


class NotACall(Exception):
    """The text does not hold calls."""


def read_json(text: str) -> Iterator[Call]:
    """One or more objects with a name and arguments, or lists of them."""
    decoder, at = json.JSONDecoder(parse_float=_finite, parse_constant=_refuse), 0
    try:
        while rest := text[at:].lstrip(" \t\r\n;,"):
            value, length = decoder.raw_decode(rest)
            yield from map(_call, value if isinstance(value, list) else [value])
            at = len(text) - len(rest) + length
    except (ValueError, RecursionError):
        raise NotACall from None


def _finite(text: str) -> float:
    """JSON has numbers that are no float64: they become the largest one."""
    value = float(text)
    return value if math.isfinite(value) else math.copysign(sys.float_info.max, value)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _call(value: Any) -> Call:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not (isinstance(value, dict) and isinstance(value.get("name"), str)):
        raise NotACall
    arguments: Any = next((value[key] for key in ARGUMENTS if key in value), {})
    if not isinstance(arguments, dict):
        raise NotACall
    return Call(value["name"], arguments)


def read_python(text: str) -> Iterator[Call]:
    """Calls as Python writes them, with literal keyword arguments; a fence around them and print() are dropped."""
    text = re.sub(r"\A\s*```\w*\n|\n?```\s*\Z", "", text).strip()
    try:
        body = ast.parse(text).body
        for statement in body:
            if not isinstance(statement, ast.Expr):
                raise NotACall
            value = statement.value
            for each in value.elts if isinstance(value, (ast.List, ast.Tuple)) else [value]:
                yield _python_call(each)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise NotACall from None


def _python_call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call):
        raise NotACall
    if isinstance(node.func, ast.Name) and node.func.id == "print" and len(node.args) == 1 and not node.keywords:
        return _python_call(node.args[0])
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        raise NotACall
    if not isinstance(node.func, (ast.Name, ast.Attribute)):
        raise NotACall
    named = {str(keyword.arg): _literal(keyword.value) for keyword in node.keywords}
    return Call(ast.unparse(node.func), named)


def _literal(node: ast.expr) -> Any:
    return ast.literal_eval(_Constants().visit(node))


class _Constants(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.copy_location(ast.Constant(CONSTANTS[node.id]), node) if node.id in CONSTANTS else node


def read_named(text: str) -> Iterator[Call]:
    """A name, [ARGS], and the arguments as JSON."""
    name, found, arguments = text.partition("[ARGS]")
    try:
        value = json.loads(arguments, parse_float=_finite, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise NotACall from None
    if not found or not isinstance(value, dict):
        raise NotACall
    yield Call(name.strip(), value)


def _spell_python(call: Call) -> str:
    return f"{call.name}({', '.join(f'{key}={value!r}' for key, value in call.arguments.items())})"


@dataclass(frozen=True)
class Format:
    """A way to write calls.

    Without `begin`, the whole answer is calls or text. `read` reads what is between `begin` and `end`; `end` empty: up
    to the next `begin` or the end of the answer. `key` names the arguments in JSON. `signs`: texts of a chat template
    that asks for this format.
    """

    begin: str
    end: str
    read: Callable[[str], Iterator[Call]]
    spell: Callable[[Call], str]
    signs: Sequence[str]
    key: str = "arguments"
    space: str = ""  # between the marks and the call

    def write(self, calls: Sequence[Call]) -> str:
        """The calls as the model would write them."""
        if self.read is read_json and not self.end:
            spelled = [self.spell(call) for call in calls]
            return self.begin + (f"[{', '.join(spelled)}]" if len(calls) > 1 or self.begin else spelled[0])
        return "\n".join(f"{self.begin}{self.space}{self.spell(call)}{self.space}{self.end}" for call in calls)


def _spell_json(key: str) -> Callable[[Call], str]:
    return lambda call: json.dumps({"name": call.name, key: call.arguments}, ensure_ascii=False)


def _spell_named(call: Call) -> str:
    return f"{call.name}[ARGS]{json.dumps(call.arguments, ensure_ascii=False)}"


PLAIN, HERMES = "json", "hermes"
# The order decides if a template has signs of several formats.
FORMATS = {
    HERMES: Format("<tool_call>", "</tool_call>", read_json, _spell_json("arguments"), ("<tool_call>",), space="\n"),
    "minicpm": Format(
        "<|tool_call_start|>",
        "<|tool_call_end|>",
        read_python,
        lambda call: f"```python\n{_spell_python(call)}\n```",
        ("<|tool_call_start|>",),
        space="\n",
    ),
    "mistral-args": Format("[TOOL_CALLS]", "", read_named, _spell_named, ("[ARGS]",)),
    "mistral": Format("[TOOL_CALLS]", "", read_json, _spell_json("arguments"), ("[TOOL_CALLS]",)),
    "llama3": Format(
        "", "", read_json, _spell_json("parameters"), ("<|python_tag|>", "Environment: ipython"), key="parameters"
    ),
    "gemma": Format("```tool_code", "```", read_python, _spell_python, ("```tool_code",), space="\n"),
    PLAIN: Format("", "", read_json, _spell_json("arguments"), ()),
}
PREFIXES = ("<|python_tag|>",)  # before a whole answer that is a call


def format_of(template: ChatTemplate) -> str:
    """The name of the format that a template asks for: that of its signs, else JSON if it reads tools, else Hermes."""
    text = "\n".join(template.literals)
    for name, format in FORMATS.items():
        if any(sign in text for sign in format.signs):
            return name
    return PLAIN if reads_tools(template) else HERMES


def reads_tools(template: ChatTemplate) -> bool:
    """Whether the template writes tools into the prompt."""
    function = {"name": PROBE, "description": "", "parameters": {"type": "object", "properties": {}}}
    try:
        asked = template.fit([{"role": "user", "content": "question"}])
        return PROBE in template.render(asked, tools=[{"type": "function", "function": function}])
    except Exception:  # BadInput from the template, or one that drops questions
        return False


def calls_of(format: Format, text: str) -> list[Call]:
    """The calls in a text between the marks. Raises NotACall."""
    if len(text) > LONGEST:
        raise NotACall
    found = list(format.read(text))
    try:
        json.dumps([call.arguments for call in found], allow_nan=False)
    except (TypeError, ValueError, RecursionError):  # e.g. Python's sets, infinity
        raise NotACall from None
    if not found:
        raise NotACall
    return found

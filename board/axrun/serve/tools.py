"""Tools of a chat request: which may be called, how the model is told, and how earlier calls reach the template.

https://platform.openai.com/docs/guides/function-calling
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from axrun.errors import BadInput
from axrun.serve.errors import invalid
from axrun.text.template import ChatTemplate
from axrun.text.tokenizer import Tokenizer
from axrun.text.tool_formats import FORMATS, PREFIXES, Call, Format, format_of, reads_tools
from axrun.text.tool_grammar import grammar
from axrun.text.tool_stream import ToolStream

Message = dict[str, Any]

MISTRAL_ID = re.compile("[A-Za-z0-9]{9}")  # the only form that Mistral's templates accept
PLAIN_KEYS = ("role", "content", "reasoning_content")  # of messages for a template that knows no tools
RESULT = "<tool_response>\n{}\n</tool_response>"
ASK = """# Tools

You can call these functions:
{tools}

To call functions, answer in this form:
{example}"""
EXAMPLE = Call("name-of-the-function", {"name-of-the-argument": "value"})


@dataclass(frozen=True)
class Tools:
    """The tools that an answer may call. `single`: at most one call. `forced`: at least one call."""

    format: Format
    functions: Sequence[Mapping[str, Any]]
    single: bool
    forced: bool

    def stream(self) -> ToolStream:
        """Separates the calls from the text of one answer."""
        return ToolStream(self.format, {function["name"] for function in self.functions}, self.single)

    def grammar(self, tokenizer: Tokenizer, instead: Mapping[str, Any] | None = None) -> str:
        """The grammar of the calls; `instead`: JSON that is valid under this schema is an answer too.

        Raises BadInput for a schema that cannot be enforced.
        """
        given = [
            {"name": function["name"], "parameters": function.get("parameters", {})} for function in self.functions
        ]
        return grammar(self.format, given, tokenizer, self.single, instead)


class Toolbox:
    """Tool calling with one chat template. `name` is a key of FORMATS; None: chosen from the template."""

    def __init__(self, template: ChatTemplate | None, tokenizer: Tokenizer, name: str | None = None) -> None:
        self._template, self._tokenizer, self._name = template, tokenizer, name

    @functools.cached_property
    def name(self) -> str:
        """The name of the format of calls."""
        assert self._template is not None
        return self._name or format_of(self._template)

    @property
    def format(self) -> Format:
        return FORMATS[self.name]

    @functools.cached_property
    def native(self) -> bool:
        """Whether the template itself handles tools, calls and results."""
        return self._template is not None and reads_tools(self._template)

    @functools.cached_property
    def marks(self) -> frozenset[int]:
        """The special tokens that belong to a call. They are part of the text; other special tokens are not."""
        texts: Collection[str] = (self.format.begin, self.format.end, "[ARGS]", *PREFIXES)
        added = self._tokenizer.added_tokens
        return frozenset(token for token in self._tokenizer.special_ids if added[token].content in texts)

    def tools_of(self, body: Mapping[str, Any]) -> Tools | None:
        """The tools of a request that may be called. Raises ApiError if its choice is not among them."""
        functions = [tool["function"] for tool in body.get("tools", ())]
        names = [function["name"] for function in functions]
        twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
        if twice is not None:
            raise invalid(f"Two tools have the name {twice!r:.60}.", "tools")
        choice = body.get("tool_choice", "auto")
        if isinstance(choice, dict):
            wanted = choice["function"]["name"]
            functions = [function for function in functions if function["name"] == wanted]
            if not functions:
                raise invalid(f"tool_choice names {wanted!r:.60}, which is not among the tools.", "tool_choice")
        elif choice == "required" and not functions:
            raise invalid("tool_choice is required, and there are no tools.", "tool_choice")
        if not functions or choice == "none":
            return None
        single = not body.get("parallel_tool_calls", True) or isinstance(choice, dict)
        return Tools(self.format, functions, single, choice not in ("auto", "none"))

    def prompt(self, messages: Sequence[Message], tools: Tools | None) -> tuple[list[Message], dict[str, Any]]:
        """The messages and variables for the template."""
        if not self.native:
            return self._told(messages, tools), {}
        variables = {} if tools is None else {"tools": [{"type": "function", "function": f} for f in tools.functions]}
        return [self._native(message) for message in messages], variables

    def _native(self, message: Message) -> Message:
        message = dict(message)
        if "tool_calls" in message:
            message["tool_calls"] = [
                {"id": self._id(call["id"]), "type": "function", "function": call["function"]}
                for call in message["tool_calls"]
            ]
        if "tool_call_id" in message:
            message["tool_call_id"] = self._id(message["tool_call_id"])
        return message

    def _id(self, given: str) -> str:
        if not self.name.startswith("mistral") or MISTRAL_ID.fullmatch(given):
            return given
        return hashlib.sha256(given.encode("utf-8", "replace")).hexdigest()[:9]

    def _told(self, messages: Sequence[Message], tools: Tools | None) -> list[Message]:
        """Messages for a template that knows no tools: they are described in the system message."""
        plain: list[Message] = []
        for message in messages:
            role, content = message["role"], _text(message["content"])
            if role == "tool":
                result = RESULT.format(content)
                if plain and plain[-1].get("results"):
                    plain[-1]["content"] += f"\n{result}"
                else:
                    plain.append({"role": "user", "content": result, "results": True})
            elif message.get("tool_calls"):
                made = [Call(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]
                calls = self.format.write(made)
                plain.append({**message, "content": f"{content}\n{calls}" if content else calls})
            else:
                plain.append(dict(message))
        plain = [{key: message[key] for key in message if key in PLAIN_KEYS} for message in plain]
        return plain if tools is None else self._asked(plain, tools)

    def _asked(self, messages: list[Message], tools: Tools) -> list[Message]:
        listed = "\n".join(json.dumps(function, ensure_ascii=False) for function in tools.functions)
        ask = ASK.format(tools=listed, example=tools.format.write([EXAMPLE]))
        if messages[0]["role"] == "system":
            head, rest = messages[0], messages[1:]
            return [{**head, "content": f"{_text(head['content'])}\n\n{ask}"}, *rest]
        assert self._template is not None
        asked = [{"role": "system", "content": ask}, *messages]
        try:
            self._template.render(self._template.fit(asked))
        except BadInput:  # the template refuses system messages
            first = next((number for number, message in enumerate(messages) if message["role"] == "user"), 0)
            told = {**messages[first], "content": f"{ask}\n\n{_text(messages[first]['content'])}"}
            return [*messages[:first], told, *messages[first + 1 :]]
        return asked


def read_calls(message: Mapping[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """The calls of an assistant message, with their arguments as objects. Raises ApiError for other arguments."""
    for number, call in enumerate(message.get("tool_calls", ())):
        given = call["function"].get("arguments", "")
        arguments = read_arguments(given, f"{where}.tool_calls[{number}].function.arguments")
        yield {"id": call.get("id", ""), "function": {"name": call["function"]["name"], "arguments": arguments}}


def read_arguments(given: str | Mapping[str, Any], param: str) -> dict[str, Any]:
    """The arguments of a call as an object; empty text means none. Raises ApiError for others."""
    try:
        arguments = json.loads(given) if isinstance(given, str) and given.strip() else given or {}
    except (ValueError, RecursionError) as error:
        raise invalid(f"{param} is not JSON: {error}.", param) from None
    if not isinstance(arguments, dict):
        raise invalid(f"{param} is not a JSON object.", param)
    return arguments


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)

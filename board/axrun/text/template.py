"""The chat template of a checkpoint, which turns messages into the prompt format of the model.

Templates come with checkpoints and are untrusted, so they run in jinja2's sandbox. They can use the same functions as
in transformers: https://huggingface.co/docs/transformers/chat_templating_writing
"""

from __future__ import annotations

import functools
import json
import traceback
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from axrun.errors import BadInput
from axrun.text.control_tokens import Marker, control_ids, encode_marked
from axrun.text.hf_files import read_json, special_tokens, template_file

if TYPE_CHECKING:
    from axrun.text.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]

STRING, PARTS = "string", "parts"
REASONING = ("reasoning_content", "thinking", "reasoning")  # keys of the reasoning in a message, the standard one first
PROBE = "qzx7probe"  # unchanged by trimming, lower-casing and JSON
# Probe conversations: how a template reads the content of each role. Some templates require a system message first.
TURNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "user": (("user",), ("system", "user")),
    "system": (("system", "user"),),
    "assistant": (("user", "assistant", "user"), ("system", "user", "assistant", "user")),
}


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here it only outputs it.

    It is a call block, as in transformers: variables set inside are not visible outside.
    """

    tags = {"generation"}  # noqa: RUF012  (jinja2's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_show"), [], [], body).set_lineno(line)

    def _show(self, caller: Any) -> Any:
        return caller()


class Namespace(jinja2.utils.Namespace):
    """A namespace that refuses names with a leading underscore."""

    def __init__(*args: Any, **values: Any) -> None:
        for name in dict(*args[1:], **values):
            _expect_public(name)
        jinja2.utils.Namespace.__init__(*args, **values)

    def __setitem__(self, name: str, value: Any) -> None:
        _expect_public(name)
        super().__setitem__(name, value)


class ChatTemplate:
    """A compiled template. `special` are the special tokens it can refer to, `file` is its file name.

    `control_tokens` is `chat_control_tokens` of tokenizer_config.json, None if absent.
    """

    def __init__(
        self,
        source: str,
        special: Mapping[str, str],
        file: str = "",
        control_tokens: Sequence[str] | None = None,
    ) -> None:
        """Raises BadInput if the template is not valid Jinja."""
        self.control_tokens = control_tokens
        self.refusal: str | None = None  # why it refuses every user message; set by `forms`
        self._file = file
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        environment.globals["namespace"] = Namespace
        self._special = dict(special)
        try:
            self._tree = environment.parse(source)
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise BadInput(f"the chat template is damaged: {self._told(error)}\nRun without it: --raw.") from None

    @classmethod
    def find(cls, hf: Path) -> ChatTemplate | None:
        """The template in a folder of Hugging Face files, or None. Raises BadInput."""
        found = template_file(hf)
        if found is None:
            return None
        listed = read_json(hf / "tokenizer_config.json").get("chat_control_tokens")
        control = [str(token) for token in listed] if isinstance(listed, list) else None
        return cls(found[1], special_tokens(hf), found[0], control)

    @functools.cached_property
    def literals(self) -> frozenset[str]:
        """The literal text in the template."""
        texts = {node.data for node in self._tree.find_all(jinja2.nodes.TemplateData)}
        constants = (node.value for node in self._tree.find_all(jinja2.nodes.Const))
        return frozenset(texts.union(value for value in constants if isinstance(value, str)))

    @functools.cached_property
    def variables(self) -> frozenset[str]:
        """Names of variables that the template reads and does not set itself."""
        return frozenset(jinja2.meta.find_undeclared_variables(self._tree))

    def render(self, messages: Messages, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The prompt for messages with `role` and `content`. It contains all special tokens: encode it without more.

        Raises BadInput with the message of the template if it refuses them.
        """
        try:
            return self._rendered(messages, add_generation_prompt, variables)
        except Exception as error:  # templates can raise anything
            raise BadInput(f"the chat template refuses these messages: {error}") from None

    def _rendered(self, messages: Messages, add_generation_prompt: bool, variables: Mapping[str, Any]) -> str:
        given = {"tools": None, "documents": None, **self._special, **variables}
        plain = [_message(message) for message in messages]
        return self._template.render(messages=plain, add_generation_prompt=add_generation_prompt, **given)

    def _told(self, error: Exception) -> str:
        """Message of a template error, with file and line."""
        lines = [error.lineno] if isinstance(error, jinja2.TemplateSyntaxError) else []
        frames = traceback.extract_tb(error.__traceback__)
        lines += [frame.lineno for frame in frames if frame.filename == "<template>" and frame.lineno][-1:]
        where = " ".join([*([self._file] if self._file else []), *(f"line {line}" for line in lines[:1])])
        words = " ".join(str(error).split()) or type(error).__name__
        return f"{where}: {words:.300}" if where else f"{words:.300}"

    def expect_question(self) -> None:
        """Raises BadInput for a template that refuses or drops user messages."""
        if self.forms["user"] is None:
            raise BadInput(
                f"the chat template refuses every question: {self.refusal}"
                if self.refusal is not None
                else "the chat template drops the content of user messages, as a string and as a list of text parts: "
                "the prompt would not contain the question"
            )

    def fit(self, messages: Messages) -> list[dict[str, Any]]:
        """The messages with their text in the form that the template reads: a string, or a list with one text part.

        Consecutive text parts are joined. Raises BadInput for a template that drops user messages.
        """
        return [
            {**message, "content": self._fit(message)} if "content" in message else {**message} for message in messages
        ]

    def _fit(self, message: Mapping[str, Any]) -> Any:
        content = message["content"]
        if not isinstance(content, (str, list)):
            return content
        form = self.forms.get(str(message.get("role")), self.forms["user"])
        if form is None:
            try:
                self.expect_question()
            except BadInput as error:
                raise BadInput(f"{error}\nRun without the template: axrun run --raw, or /v1/completions.") from None
        if isinstance(content, list):
            if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
                return content
            content = "".join(str(part.get("text", "")) for part in content)
        return content if form == STRING else [{"type": "text", "text": content}]

    @functools.cached_property
    def forms(self) -> dict[str, str | None]:
        """The form in which the template reads the content of each role: STRING if that works, else PARTS.

        None for the user role if neither works; the other roles then have the same value.
        """
        found: dict[str, str | None] = {}
        refusals: list[str | None] = []  # of user messages; None if one was rendered without its content
        for role, conversations in TURNS.items():
            usual = found.get("user")
            tries = ((form, turns) for form in (STRING, PARTS) for turns in conversations)
            reached = (form for form, turns in tries if self._reaches(role, turns, form, usual or form, refusals))
            found[role] = next(reached, usual)
            if role == "user" and found[role] is None and None not in refusals:
                self.refusal = refusals[0]
        return found

    def _reaches(self, role: str, turns: Sequence[str], form: str, usual: str, refusals: list[str | None]) -> bool:
        messages = [
            {"role": turn, "content": _as(form, PROBE) if turn == role else _as(usual, "question")} for turn in turns
        ]
        try:
            reached = PROBE in self._rendered(messages, True, {}).lower()
        except Exception as error:  # templates can raise anything
            refusals.append(self._told(error))
            return False
        refusals.append(None)
        return reached


def _as(form: str, text: str) -> Any:
    return text if form == STRING else [{"type": "text", "text": text}]


def chat_ids(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Messages, parse_special: bool = False, **variables: Any
) -> list[int]:
    """Token ids of a conversation rendered with the template.

    Special tokens spelled in a message are text, or control tokens with `parse_special`.
    Raises BadInput for messages that the template refuses, and for text that is not valid Unicode.
    """
    fitted = template.fit(messages)
    if parse_special:
        return tokenizer.encode(template.render(fitted, **variables), special=False)
    control = control_ids(tokenizer, template)
    marker = Marker(tokenizer, control)
    prompt = template.render(marker.mark(fitted), **marker.mark(variables))
    if not marker.spelled:
        return tokenizer.encode(prompt, special=False)
    return encode_marked(tokenizer, prompt, marker, control)


def prompt_ids(
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    prompt: str,
    system: str | None = None,
    parse_special: bool = False,
) -> list[int]:
    """Token ids of a question, rendered with the template if there is one.

    Without a template, special tokens in the prompt are control tokens, so that the prompt can contain a template.
    Raises BadInput for a system message without a template, and for text that is not valid Unicode.
    """
    if template is None:
        if system is not None:
            raise BadInput(
                "a system message needs a chat template, and none is used here; put the text into the prompt"
            )
        return tokenizer.encode(prompt)
    messages = [{"role": "system", "content": system}] if system is not None else []
    return chat_ids(tokenizer, template, [*messages, {"role": "user", "content": prompt}], parse_special)


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without null keys, and with the reasoning under all names that templates read."""
    plain = {key: value for key, value in message.items() if value is not None}
    reasoning = next((plain[name] for name in REASONING if name in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Plain JSON; jinja2's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _expect_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace accepts no name that begins with an underscore: {name!r}")

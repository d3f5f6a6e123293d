"""The checkpoint's chat template: messages become the prompt that the model was trained on.

Templates come with checkpoints and are not trusted: they run in jinja2's sandbox. What one may use is what transformers
gives it: https://huggingface.co/docs/transformers/chat_templating_writing
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from board.control_tokens import encode_marked, mark
from board.errors import BadInput
from board.hf_files import special_tokens, template_source

if TYPE_CHECKING:
    from board.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]

STRING, PARTS = "string", "parts"
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a message's reasoning, the standard one first
PROBE = "qzx7probe"  # survives trimming, changes of case and JSON
# Conversations that show how a template takes the content of a role; some templates want a system message first.
TURNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "user": (("user",), ("system", "user")),
    "system": (("system", "user"),),
    "assistant": (("user", "assistant", "user"), ("system", "user", "assistant", "user")),
}


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here it shows them.

    A call block, as in transformers: what is set inside is not seen outside.
    """

    tags = {"generation"}  # noqa: RUF012  (jinja2's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_show"), [], [], body).set_lineno(line)

    def _show(self, caller: Any) -> Any:
        return caller()


class Namespace(jinja2.utils.Namespace):
    """Takes no name that begins with an underscore."""

    def __init__(*args: Any, **values: Any) -> None:
        for name in dict(*args[1:], **values):
            _expect_public(name)
        jinja2.utils.Namespace.__init__(*args, **values)

    def __setitem__(self, name: str, value: Any) -> None:
        _expect_public(name)
        super().__setitem__(name, value)


class ChatTemplate:
    """A compiled template. `special` are the special tokens it may name."""

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        """Raises BadInput when the template is no Jinja."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        environment.globals["namespace"] = Namespace
        self._special = dict(special)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise BadInput(f"the chat template is damaged: {error}\nAsk without it: --raw.") from None

    @classmethod
    def find(cls, hf: Path) -> ChatTemplate | None:
        """The template of a folder of Hugging Face files, None where it has none. Raises BadInput."""
        source = template_source(hf)
        return None if source is None else cls(source, special_tokens(hf))

    def render(self, messages: Messages, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The prompt for messages of `role` and `content`; its special tokens are all there, add no more.

        Raises BadInput with the template's own words where it refuses them.
        """
        given = {"tools": None, "documents": None, **self._special, **variables}
        plain = [_message(message) for message in messages]
        try:
            return self._template.render(messages=plain, add_generation_prompt=add_generation_prompt, **given)
        except Exception as error:  # the template is a program of its own
            raise BadInput(f"the chat template refuses these messages: {error}") from None

    def fit(self, messages: Messages) -> list[dict[str, Any]]:
        """The messages with their text as the template takes it: a string, or a list of one part of type text.

        Text parts that follow one another become one. Raises BadInput for a template that drops what the user says.
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
            raise BadInput(
                "the chat template drops what the user says, be it a string or a list of parts: no prompt would hold "
                "the question\nAsk without the template: axrun run --raw, or /v1/completions."
            )
        if isinstance(content, list):
            if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
                return content
            content = "".join(str(part.get("text", "")) for part in content)
        return content if form == STRING else [{"type": "text", "text": content}]

    @functools.cached_property
    def forms(self) -> dict[str, str | None]:
        """How the content of each role reaches the prompt: STRING where that works, else PARTS.

        None for a user's content that does not reach it; other roles are then as the user's.
        """
        found: dict[str, str | None] = {}
        for role, conversations in TURNS.items():
            usual = found.get("user")
            tries = ((form, turns) for form in (STRING, PARTS) for turns in conversations)
            reached = (form for form, turns in tries if self._reaches(role, turns, form, usual or form))
            found[role] = next(reached, usual)
        return found

    def _reaches(self, role: str, turns: Sequence[str], form: str, usual: str) -> bool:
        messages = [
            {"role": turn, "content": _as(form, PROBE) if turn == role else _as(usual, "question")} for turn in turns
        ]
        try:
            return PROBE in self.render(messages).lower()
        except BadInput:
            return False


def _as(form: str, text: str) -> Any:
    return text if form == STRING else [{"type": "text", "text": text}]


def chat_ids(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Messages, parse_special: bool = False, **variables: Any
) -> list[int]:
    """Token ids of a conversation, in the template, which writes its own special tokens.

    Special tokens that are spelled in a message are text, and control tokens only with `parse_special`.
    Raises BadInput for messages that the template refuses, and for text that is no Unicode.
    """
    fitted = template.fit(messages)
    marked = None if parse_special else mark(tokenizer, fitted)
    if marked is None:
        return tokenizer.encode(template.render(fitted, **variables), special=False)
    return encode_marked(tokenizer, template.render(marked, **variables))


def prompt_ids(
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    prompt: str,
    system: str | None = None,
    parse_special: bool = False,
) -> list[int]:
    """Token ids of a question, in the template where there is one; it writes its own special tokens.

    Without a template, special tokens in the prompt are control tokens: whoever asks so writes the template.
    Raises BadInput for a system message without a template to put it in, and for text that is no Unicode.
    """
    if template is None:
        if system is not None:
            raise BadInput("a system message needs a chat template, and none is used here; put it into the prompt")
        return tokenizer.encode(prompt)
    messages = [{"role": "system", "content": system}] if system is not None else []
    return chat_ids(tokenizer, template, [*messages, {"role": "user", "content": prompt}], parse_special)


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Without keys that are null, and with its reasoning under the names that templates read."""
    plain = {key: value for key, value in message.items() if value is not None}
    reasoning = next((plain[name] for name in REASONING if name in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Plain JSON: jinja2's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _expect_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no name that begins with an underscore: {name!r}")

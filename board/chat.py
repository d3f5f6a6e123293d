"""The checkpoint's chat template: messages become the prompt that the model was trained on.

Templates come with checkpoints and are not trusted: they run in jinja2's sandbox. What one may use is what transformers
gives it: https://huggingface.co/docs/transformers/chat_templating_writing
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from board.errors import BadInput
from board.tokenizer import Tokenizer, read_json, special_tokens

Messages = Sequence[Mapping[str, Any]]


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here it shows them."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template. `special` are the special tokens it may name."""

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        """Raises BadInput when the template is no Jinja."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._special = dict(special)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise BadInput(f"the chat template is damaged: {error}\nAsk without it: --raw.") from None

    @classmethod
    def find(cls, hf: Path) -> ChatTemplate | None:
        """The template of a folder of Hugging Face files, None where it has none. Raises BadInput."""
        source = _source(hf)
        return None if source is None else cls(source, special_tokens(hf))

    def render(self, messages: Messages, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The prompt for messages of `role` and `content`; its special tokens are all there, add no more.

        Raises BadInput with the template's own words where it refuses them.
        """
        given = {"tools": None, "documents": None, **self._special, **variables}
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **given)
        except Exception as error:  # the template is a program of its own
            raise BadInput(f"the chat template refuses these messages: {error}") from None


def prompt_ids(
    tokenizer: Tokenizer, template: ChatTemplate | None, prompt: str, system: str | None = None
) -> list[int]:
    """Token ids of a question, in the template where there is one; it writes its own special tokens.

    Raises BadInput for a system message without a template to put it in, and for text that is no Unicode.
    """
    if template is None:
        if system is not None:
            raise BadInput("a system message needs a chat template, and none is used here; put it into the prompt")
        return tokenizer.encode(prompt)
    messages = [{"role": "system", "content": system}] if system is not None else []
    return tokenizer.encode(template.render([*messages, {"role": "user", "content": prompt}]), special=False)


def _source(hf: Path) -> str | None:
    """A file of its own comes before the tokenizer's configuration, as in transformers."""
    file = hf / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise BadInput(f"cannot read {file}: {error}\nBuild or copy the bundle again.") from None
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = read_json(hf / name).get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        if isinstance(template, str):
            return template
    return None


def _tojson(value: Any, indent: int | None = None, **options: Any) -> str:
    """Plain JSON: jinja2's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)

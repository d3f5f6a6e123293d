"""The text files of a Hugging Face checkpoint, as stored in hf/ of a bundle: JSON, special tokens, template.

If two files disagree, the precedence is that of transformers' AutoTokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from axrun.errors import BadInput

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if the file does not exist. Raises BadInput if it is damaged."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"cannot read {path}: {error}\nBuild or copy the bundle again.") from None
    if not isinstance(values, dict):
        raise BadInput(f"{path} holds a {type(values).__name__}, expected a JSON object")
    return values


def special_tokens(hf: Path) -> dict[str, str]:
    """The special tokens by the names that chat templates use, e.g. bos_token.

    special_tokens_map.json is used only if tokenizer_config.json has no `added_tokens_decoder`.
    """
    named = read_json(hf / "tokenizer_config.json")
    if "added_tokens_decoder" not in named:
        named = {**named, **read_json(hf / "special_tokens_map.json")}
    found = {name: named[name] for name in SPECIAL if named.get(name)}
    return {name: str(token.get("content") if isinstance(token, dict) else token) for name, token in found.items()}


def template_source(hf: Path) -> str | None:
    """The source of the chat template, or None. Raises BadInput."""
    found = template_file(hf)
    return None if found is None else found[1]


def template_file(hf: Path) -> tuple[str, str] | None:
    """The file name and source of the chat template, or None. Raises BadInput.

    The order is chat_template.jinja, tokenizer_config.json, chat_template.json (used by processors only).
    """
    file = hf / "chat_template.jinja"
    if file.is_file():
        try:
            return file.name, file.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise BadInput(f"cannot read {file}: {error}\nBuild or copy the bundle again.") from None
    for name in ("tokenizer_config.json", "chat_template.json"):
        template = read_json(hf / name).get("chat_template")
        if isinstance(template, list):  # several named templates
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        if isinstance(template, str):
            return name, template
    return None

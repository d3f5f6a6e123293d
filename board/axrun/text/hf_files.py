"""The text files of a Hugging Face checkpoint, as a bundle's hf/ folder holds them: JSON, special tokens, template.

Where two files say different things, the order is that of transformers' AutoTokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from axrun.errors import BadInput

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file. Raises BadInput when it is damaged."""
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

    special_tokens_map.json counts only beside a tokenizer_config.json without `added_tokens_decoder`.
    """
    named = read_json(hf / "tokenizer_config.json")
    if "added_tokens_decoder" not in named:
        named = {**named, **read_json(hf / "special_tokens_map.json")}
    found = {name: named[name] for name in SPECIAL if named.get(name)}
    return {name: str(token.get("content") if isinstance(token, dict) else token) for name, token in found.items()}


def template_source(hf: Path) -> str | None:
    """The chat template, None where there is none. Raises BadInput."""
    found = template_file(hf)
    return None if found is None else found[1]


def template_file(hf: Path) -> tuple[str, str] | None:
    """The chat template behind the name of its file, None where there is none. Raises BadInput.

    chat_template.jinja comes before tokenizer_config.json, chat_template.json (which only processors have) last.
    """
    file = hf / "chat_template.jinja"
    if file.is_file():
        try:
            return file.name, file.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise BadInput(f"cannot read {file}: {error}\nBuild or copy the bundle again.") from None
    for name in ("tokenizer_config.json", "chat_template.json"):
        template = read_json(hf / name).get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        if isinstance(template, str):
            return name, template
    return None

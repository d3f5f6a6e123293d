"""The config of a text model inside of a multimodal checkpoint: `text_config`, or keys beside `vision_config`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from axc import config_keys
from axc.families.family import Family, Inside
from axrun.errors import BadInput

PARTS = ("vision_config", "audio_config")  # the keys of config.json that have the other parts
TIED = "tie_word_embeddings"
MROPE = ("mrope_section", "mrope_interleaved")


def is_multimodal(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a model with parts for other things than text."""
    return any(isinstance(values.get(key), dict) for key in PARTS)


def text_config(
    values: dict[str, Any], path: Path, families: Mapping[str, Family[Any]], say: Callable[[str], None]
) -> dict[str, Any]:
    """The config.json of the text model alone; the given one where it is no multimodal model that a family is in.

    Raises BadInput for a text model of another model_type than that of the family.
    """
    outer = values.get("model_type")
    if not isinstance(outer, str):
        return values
    names = {name: family.inside[outer] for name, family in families.items() if outer in family.inside}
    if not names or not is_multimodal(values):
        return values
    text, parts = values.get("text_config"), [key for key in PARTS if values.get(key) is not None]
    if text is None and any(inside.flat for inside in names.values()):
        text = {key: value for key, value in values.items() if key not in (*PARTS, "text_config", "model_type")}
    if not isinstance(text, dict):
        raise BadInput(f"{path}: text_config of a {outer} is {text!r:.60}; expected an object")
    name = text.get("model_type", next(iter(names)))
    if not isinstance(name, str) or name not in names:
        raise BadInput(
            f"{path}: the text model of this {outer} is {name!r:.60}; built are {', '.join(names)}\n"
            "Save the text model alone, with its own config.json."
        )
    config_keys.refuse_shared({**values, "text_config": None}, path, families[name].reads)
    inside = names[name]
    tied = bool(values.get(TIED, inside.tied)) or text.get(TIED) is True
    say(f"config.json: of this {outer} the text model ({name}) is built; left out: {', '.join(parts)}")
    return {**_plain_rope(text, inside), "model_type": name, TIED: tied}


def _plain_rope(text: dict[str, Any], inside: Inside) -> dict[str, Any]:
    """With text alone the three position ids of mrope are equal: it is the plain rope."""
    if not inside.mrope:
        return text
    changed = {}
    for where in ("rope_scaling", "rope_parameters"):
        if isinstance(nested := text.get(where), dict):
            kind = nested.get("rope_type", nested.get("type"))
            kept = {key: value for key, value in nested.items() if key not in MROPE}
            changed[where] = {**kept, "rope_type": "default"} if kind == "mrope" else kept
    return {**text, **changed}

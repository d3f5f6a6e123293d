"""The architectures, one file each: qwen2.py builds model_type qwen2. Files in this folder are found at import.

docs/adding-a-family.md explains how to add one.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from axc import config_keys
from axc.config_json import Reader
from axc.config_rope import NESTED_ROPE_KEYS, ORIGINAL_LENGTH
from axc.families import multimodal
from axc.families.family import Family, ModelConfig
from axc.rope import Rope
from axrun.errors import BadInput


def _found() -> Iterator[tuple[str, Family[Any]]]:
    """The FAMILY of each file in this folder; files without one hold shared code."""
    for module in pkgutil.iter_modules(__path__):
        family = getattr(importlib.import_module(f"{__name__}.{module.name}"), "FAMILY", None)
        if family is not None:
            yield module.name, family


FAMILIES: dict[str, Family[Any]] = dict(_found())
RECIPE = "docs/adding-a-family.md"
SHOWN = 4  # misspelt keys


def read_config(
    values: dict[str, Any], path: Path, model_type: str | None, say: Callable[[str], None] = lambda line: None
) -> tuple[Family[Any], ModelConfig]:
    """The family and the ModelConfig of a config.json; `model_type` replaces its model_type.

    `say` gets a note on ignored keys. Raises BadInput if the build would compute something else than the model.
    """
    values = multimodal.text_config(values, path, FAMILIES, say)
    given = values.get("model_type")
    name = model_type or given
    if not isinstance(name, str) or name not in FAMILIES:
        raise BadInput(_not_supported(values, path, name))
    family = FAMILIES[name]
    if isinstance(given, str) and given in family.different:
        raise BadInput(f"{path}: model_type {given!r} cannot be built as {name}: {family.different[given]}")
    config_keys.refuse_shared(values, path, family.reads)
    if given != name and not family.foreign:
        raise BadInput(
            f"{path}: model_type {given!r:.60} cannot be built as {name}: they may compute differently\n"
            f"{_instead(given)}"
        )
    if given == name:
        read, native = Reader(values, path, family.defaults), True
    else:
        config_keys.refuse_unknown(values, family.reads, path, given, name)
        read, native = _as_foreign(family, values, path, name), False
    config = family.config(read)
    if not native:
        kind = getattr(config, "rope", Rope(1)).kind
        config_keys.refuse_unknown_rope(read.values, NESTED_ROPE_KEYS[kind], path, given, name)
    rope = getattr(config, "rope", None)
    known = family.reads | ({ORIGINAL_LENGTH} if rope and rope.kind != "default" else set())
    unread = config_keys.unread(read.values, known)
    if rope and native:
        unread += config_keys.unread_rope(read.values, NESTED_ROPE_KEYS)
    if unread:
        say(f"config.json: not read, as in transformers' {given}: {', '.join(unread[:4])}")
    for odd, near in islice(config_keys.misspelt(values, family.reads).items() if native else (), SHOWN):
        say(f"config.json: {odd!r:.60} is not known and not read; did you mean {near!r}?")
    if not native:
        say(f"model_type {given!r:.60} is built as {name} (--model_type): not verified to compute the same")
    return family, config


def _as_foreign(family: Family[Any], values: dict[str, Any], path: Path, name: str) -> Reader:
    """A reader for the config.json of another model_type: absent keys have the defaults of transformers' class for it.

    Raises BadInput if those defaults change what the model computes, or are unknown.
    """
    given = str(values.get("model_type"))
    try:
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError:
        raise BadInput(
            f"{path}: the defaults of absent keys of model_type {given!r:.60} are in transformers, "
            f"which is not installed\nRun `make setup`, or give the config.json of a {name} as --model_config."
        ) from None
    if given not in CONFIG_MAPPING:
        # Defaults are unknown, except of biases and tied heads: those are visible in the tensors.
        seen = {key: value for key, value in family.defaults.items() if value is None or value is False}
        return Reader(values, path, seen)
    transformers.logging.set_verbosity_error()
    try:
        filled = CONFIG_MAPPING[given].from_dict(copy.deepcopy(values)).to_dict()
    except Exception as error:  # config classes may raise anything
        words = " ".join(str(error).split()) or type(error).__name__
        raise BadInput(f"{path}: transformers cannot read it as model_type {given!r:.60}: {words:.200}") from None
    config_keys.refuse_shared(filled, path, family.reads)
    config_keys.refuse_unknown(filled, family.reads, path, given, name)
    # If its class has no key for a bias, a tied head or a window, the model has none.
    absent = {key: value for key, value in family.defaults.items() if value is None or value is False}
    return Reader(filled, path, absent)


def _not_supported(values: dict[str, Any], path: Path, name: object) -> str:
    """An error text: the nearest family, and how to add this one."""
    if isinstance(name, str) and name.lower() in FAMILIES:
        return f"{path}: model_type {name!r:.60} is not supported; did you mean {name.lower()!r}, in lower case?"
    nearest, why = _nearest(values, name)
    first = f"{path}: model_type {name!r:.60} is not supported; the nearest family by {why} is {nearest}"
    if unread := config_keys.unread(values, FAMILIES[nearest].reads):
        first += f",\nwhich does not read {', '.join(unread[:4])}{', ...' if len(unread) > 4 else ''}"
    file = name.replace("-", "_")[:60] if isinstance(name, str) else ""
    taken = {module.name for module in pkgutil.iter_modules(__path__)}
    if not file.isidentifier() or file in taken:
        file = "NAME"
    adding = f"to add this one, follow {RECIPE} and write toolchain/axc/families/{file}.py"
    return f"{first}\nREADME.md lists the supported models; {adding}."


def _instead(given: object) -> str:
    if given in FAMILIES:
        return f"{given} is a supported family: omit --model_type, or give {given}."
    return f"--model_type may name one of: {', '.join(name for name in FAMILIES if FAMILIES[name].foreign)}."


def _nearest(values: dict[str, Any], name: object) -> tuple[str, str]:
    """The family with the most similar name, or else the one that reads most of the keys, and by what it is near."""
    if named := difflib.get_close_matches(str(name)[:60], FAMILIES, n=1, cutoff=0.7):
        return named[0], "name"

    def overlap(family: str) -> tuple[int, int]:
        reads = FAMILIES[family].reads
        return len(reads & values.keys()), -len(reads - values.keys())

    return max(FAMILIES, key=overlap), "the keys it reads"

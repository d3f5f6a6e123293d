"""The architectures. One file each: `read_config`, `tensors`, `decoder_layer`, `post`, alike in every one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from axc import config_keys
from axc.config import NESTED_ROPE_KEYS, ORIGINAL_LENGTH, Kin, ModelConfig, Reader
from axc.families import llama, qwen2
from axc.graph import Graph
from axrun.errors import BadInput


class Family(Protocol):
    """What the compiler asks of an architecture."""

    REDUNDANT: tuple[str, ...]  # endings of tensor names a checkpoint may carry and a build does not need
    READS: frozenset[str]  # keys of config.json that `read_config` reads
    DEFAULTS: Mapping[str, Any]  # of keys that are absent, as in transformers' class for the model_type
    KIN: Mapping[str, Kin]  # other model_types that can be built as this one
    DIFFERENT: Mapping[str, str]  # model_types that look as if they could, and why they cannot

    def read_config(self, reader: Reader) -> ModelConfig: ...

    def tensors(self, config: ModelConfig) -> dict[str, tuple[int, ...]]: ...

    def decoder_layer(self, config: ModelConfig, index: int, positions: int, graph: Graph) -> None: ...

    def post(self, config: ModelConfig, top_k: int, graph: Graph) -> None: ...


FAMILIES: dict[str, Any] = {"qwen2": qwen2, "llama": llama}


def read_config(
    values: dict[str, Any], path: Path, model_type: str | None, say: Callable[[str], None] = lambda line: None
) -> tuple[Family, ModelConfig]:
    """The family and the ModelConfig of a config.json, to be built as `model_type` where that is given.

    `say` is told what is passed over. Raises BadInput for what would be built with another arithmetic.
    """
    given = values.get("model_type")
    name = model_type or given
    if not isinstance(name, str) or name not in FAMILIES:
        raise BadInput(_not_supported(values, path, name))
    family: Family = FAMILIES[name]
    if isinstance(given, str) and given in family.DIFFERENT:
        raise BadInput(f"{path}: model_type {given!r} cannot be built as {name}: {family.DIFFERENT[given]}")
    config_keys.refuse_shared(values, path)
    if given == name:
        read, proven = Reader(values, path, family.DEFAULTS), True
    elif isinstance(given, str) and given in family.KIN:
        read, proven = _as_kin(family.KIN[given], values, path), True
    else:
        config_keys.refuse_unknown(values, family.READS, path, given, name)
        read, proven = _as_foreign(family, values, path, name), False
    config = family.read_config(read)
    if not proven:
        config_keys.refuse_unknown_rope(read.values, NESTED_ROPE_KEYS[config.rope.kind], path, given, name)
    known = family.READS | {ORIGINAL_LENGTH} if config.rope.kind == "llama3" else family.READS
    unread = config_keys.unread(read.values, known)
    if unread:
        say(f"config.json: not read, as in transformers' {given}: {', '.join(unread[:4])}")
    if not proven:
        say(f"model_type {given!r:.60} is built as {name}: that the two compute the same rests on --model_type alone")
    return family, config


def _as_kin(kin: Kin, values: dict[str, Any], path: Path) -> Reader:
    """A config.json of another architecture as one of this family. Raises BadInput where they compute differently."""
    own = Reader(values, path, kin.defaults)
    return Reader(kin.as_family(own), path, kin.defaults)


def _as_foreign(family: Family, values: dict[str, Any], path: Path, name: str) -> Reader:
    """A config.json of a model_type of which nothing is proven: absent keys at the defaults of its class, if any.

    Raises BadInput where those defaults change what the model computes, or where nobody knows them.
    """
    given = str(values.get("model_type"))
    try:
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError:
        raise BadInput(
            f"{path}: what model_type {given!r:.60} computes where keys are absent is known to transformers only, "
            f"which is not installed\nRun `make setup`, or give the config.json of a {name} as --model_config."
        ) from None
    if given not in CONFIG_MAPPING:
        # a key that is absent has a default nobody knows; a bias or a tied head shows in the tensors
        seen = {key: value for key, value in family.DEFAULTS.items() if value is None or value is False}
        return Reader(values, path, seen)
    transformers.logging.set_verbosity_error()
    try:
        filled = CONFIG_MAPPING[given].from_dict(copy.deepcopy(values)).to_dict()
    except Exception as error:  # its classes name no limit to what they raise
        words = " ".join(str(error).split()) or type(error).__name__
        raise BadInput(f"{path}: transformers does not read it as model_type {given!r:.60}: {words:.200}") from None
    config_keys.refuse_shared(filled, path)
    config_keys.refuse_unknown(filled, family.READS, path, given, name)
    # a bias, a tied head and a window that its class does not have are none
    absent = {key: value for key, value in family.DEFAULTS.items() if value is None or value is False}
    return Reader(filled, path, absent)


def _not_supported(values: dict[str, Any], path: Path, name: object) -> str:
    """That it is not supported, and how to build it all the same where its config.json proves that one can."""
    first = f"{path}: model_type {name!r:.60} is not supported; supported are {', '.join(FAMILIES)}"
    if isinstance(name, str) and values.get("model_type") == name:
        for other, family in FAMILIES.items():
            if name in family.KIN:
                try:
                    config_keys.refuse_shared(values, path)
                    config = family.read_config(_as_kin(family.KIN[name], values, path))
                except BadInput as difference:
                    what = str(difference).partition("\n")[0].removeprefix(f"{path}: ")
                    return f"{first}\nIt is not {other} either: {what}."
                window = config.sliding_window
                length = f" and a --kv_cache_len below its sliding_window {window}" if window else ""
                return f"{first}\nThis one computes as {other} does: pass --model_type {other}{length}."
    file = name.replace("-", "_") if isinstance(name, str) and name.replace("-", "_").isidentifier() else "NAME"
    return f"{first}\nTo add it, write toolchain/axc/families/{file:.60}.py."

"""How a sentence-transformers folder makes an embedding of a text: modules.json, and the files of its modules.

https://sbert.net/docs/package_reference/sentence_transformer/models.html
What changes the embedding and is not supported is refused by name. A folder without these files has no such rules.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from axc.checkpoints.json_files import MAX_CONFIG, read_config_json
from axrun.errors import BadInput
from axrun.format.pooling import LAST_TOKEN, MEAN

MODULES = "modules.json"
POOLING = "1_Pooling/config.json"  # of a folder that lacks modules.json
TRANSFORMER = "sentence_bert_config.json"
MODEL = "config_sentence_transformers.json"
FILES = (MODULES, POOLING, TRANSFORMER, MODEL)
SUPPORTED = (LAST_TOKEN, MEAN)
# older keys of a pooling module, each true or false, and their new names
MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": MEAN,
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": LAST_TOKEN,
}
WIDTHS = ("embedding_dimension", "word_embedding_dimension")
# keys of sentence_bert_config.json that change nothing here
TRANSFORMER_KEYS = {"max_seq_length", "modality_config", "module_output_name", "unpad_inputs"}
NONE: tuple[Any, ...] = (None, False, {}, [], "")
CLASS = re.compile(r"sentence_transformers\.[\w.]*?(\w+)")


@dataclass(frozen=True)
class Pooling:
    """`mode`: lasttoken or mean, over the hidden states behind the final norm. `normalize`: to a length of 1.

    `max_tokens`: the longest text in tokens; None: no limit besides the context. `remarks` are for the user.
    """

    mode: str
    normalize: bool
    max_tokens: int | None = None
    remarks: tuple[str, ...] = ()

    def manifest(self) -> dict[str, Any]:
        """Its entry in the manifest."""
        return {key: value for key, value in asdict(self).items() if key != "remarks"}


def input_files(folder: Path) -> tuple[Path, ...]:
    """The files of a checkpoint folder that `read` may read."""
    places = _places(folder).values() if (folder / MODULES).is_file() else [POOLING.partition("/")[0]]
    modules = [f"{place}/config.json" for place in places if place not in ("", ".")]
    return tuple(folder / name for name in (MODULES, TRANSFORMER, MODEL, *modules) if (folder / name).is_file())


def read(folder: Path, hidden_size: int) -> Pooling | None:
    """The rules of a checkpoint folder, None without any. Raises BadInput for what is not supported."""
    if not (folder / MODULES).is_file():
        if not (folder / POOLING).is_file():
            return None
        return Pooling(_mode(folder / POOLING, hidden_size), True)
    places = _places(folder)
    modules = list(places)
    if modules[:2] != ["Transformer", "Pooling"] or modules[2:] not in ([], ["Normalize"]):
        listed = ", ".join(modules) or "no modules"
        raise BadInput(
            f"{folder / MODULES} lists {listed:.200}; expected Transformer, Pooling and perhaps Normalize\n"
            "Only these modules can be built."
        )
    if places["Transformer"] not in ("", "."):
        raise BadInput(
            f"{folder / MODULES} has its Transformer in the folder {places['Transformer']!a:.60}\n"
            "Give a checkpoint whose transformer is in the folder itself."
        )
    normalize = "Normalize" in places
    if normalize and places["Normalize"]:
        _refuse_other_normalize(folder / places["Normalize"] / "config.json")
    path = folder / places["Pooling"] / "config.json"
    mode = _mode(path, hidden_size)
    return Pooling(mode, normalize, _max_tokens(folder), tuple(_remarks(folder)))


def _places(folder: Path) -> dict[str, str]:
    """The folder of each module by its class, in order. Raises BadInput."""
    path, places = folder / MODULES, {}
    try:
        if path.stat().st_size > MAX_CONFIG:
            raise ValueError(f"it has more than {MAX_CONFIG} bytes")
        listed = json.loads(path.read_text("utf-8"))
        for entry in listed:
            found, place = CLASS.fullmatch(entry["type"]), entry.get("path", "")
            if found is None:
                raise BadInput(
                    f"{path} has a module {entry['type']!a:.80}, which is not one of sentence-transformers\n"
                    "Custom code is not run; only Transformer, Pooling and Normalize can be built."
                )
            if not isinstance(place, str) or Path(place).is_absolute() or ".." in Path(place).parts:
                raise BadInput(f"{path} has a module in {place!a:.80}; expected a folder inside the checkpoint")
            if found[1] in places:
                raise BadInput(f"{path} lists {found[1]} twice; one after the other is not supported")
            places[found[1]] = place
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadInput(f"cannot read {path}: {str(error)[:200] or type(error).__name__}") from None
    return places


def _mode(path: Path, hidden_size: int) -> str:
    """The pooling mode. Raises BadInput."""
    values = read_config_json(path)
    if unknown := values.keys() - {*MODES, *WIDTHS, "pooling_mode", "include_prompt"}:
        raise BadInput(
            f"{path} has {min(unknown)!a:.60}, which is not known; only mean and last-token pooling can be built"
        )
    modes = values.get("pooling_mode", [name for key, name in MODES.items() if values.get(key)] or [MEAN])
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or len(modes) != 1 or modes[0] not in SUPPORTED:
        seen = ", ".join(map(str, modes)) if isinstance(modes, list) else repr(modes)
        raise BadInput(f"{path} has pooling mode {seen:.100}; expected one of {', '.join(SUPPORTED)}, alone")
    if values.get("include_prompt", True) is not True:
        raise BadInput(f"{path}: include_prompt is false: pooling without the prompt's tokens is not supported")
    for key in WIDTHS:
        if values.get(key, hidden_size) != hidden_size:
            raise BadInput(f"{path}: {key} is {values[key]!a:.40}, the model's hidden_size is {hidden_size}")
    return str(modes[0])


def _refuse_other_normalize(path: Path) -> None:
    values = _object(path)
    for key, value in values.items():
        if key not in ("module_input_name", "module_output_name") or value not in (None, "sentence_embedding"):
            raise BadInput(f"{path}: {key} is {value!a:.60}; only the sentence embedding can be normalised")


def _max_tokens(folder: Path) -> int | None:
    """max_seq_length. Raises BadInput for settings of the transformer that change its input."""
    path = folder / TRANSFORMER
    values = _object(path)
    if values.get("transformer_task", "feature-extraction") != "feature-extraction":
        raise BadInput(f"{path}: transformer_task is {values['transformer_task']!a:.60}; expected feature-extraction")
    for key, value in values.items():
        if key not in TRANSFORMER_KEYS | {"transformer_task"} and value not in NONE:
            raise BadInput(f"{path}: {key} is {value!a:.60}, which is not supported; expected it to be off")
    longest = values.get("max_seq_length")
    if longest is not None and (type(longest) is not int or longest < 1):
        raise BadInput(f"{path}: max_seq_length is {longest!a:.40}; expected a number of tokens, or null")
    return longest


def _remarks(folder: Path) -> list[str]:
    """What a caller has to know of the prompts. Raises BadInput for a prompt that is always added."""
    path = folder / MODEL
    values = _object(path)
    if values.get("model_type", "SentenceTransformer") != "SentenceTransformer":
        raise BadInput(f"{path}: model_type is {values['model_type']!a:.60}; only SentenceTransformer can be built")
    prompts = values.get("prompts") or {}
    if not isinstance(prompts, Mapping):
        raise BadInput(f"{path}: prompts is {prompts!a:.60}; expected an object")
    usual = values.get("default_prompt_name")
    if usual is not None and prompts.get(usual) != "":
        raise BadInput(
            f"{path}: default_prompt_name is {usual!a:.60}: a prompt before every text is not supported\n"
            "Set it to null, and let the client send the prompt as a part of each text."
        )
    named = [f"{name}: {text!a:.200}" for name, text in prompts.items() if text]
    return [f"prompts of the checkpoint, for clients to put before a text: {'; '.join(named)}"] if named else []


def _object(path: Path) -> dict[str, Any]:
    return read_config_json(path) if path.is_file() else {}

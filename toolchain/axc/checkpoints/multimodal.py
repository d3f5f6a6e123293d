"""A text model inside of a multimodal checkpoint: what its tensors are called, and which are not its.

`axc.families.multimodal` takes its config out of the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from axc.checkpoints.json_files import read_config_json
from axc.families.multimodal import is_multimodal
from axc.stored import HEAD, StoredTensor, loaded_name
from axrun.errors import BadInput

# how names of the text model begin in files (transformers 4 and 5), and what stands for that here
TEXT = {"language_model.model.": "model.", "model.language_model.": "model.", f"language_model.{HEAD}": HEAD}
# how names of other parts begin
OTHERS = tuple(
    f"{model}{part}."
    for model in ("", "model.")
    for part in ("vision_tower", "vision_model", "visual", "multi_modal_projector", "audio_tower", "embed_vision")
)


def text_name(name: str) -> str | None:
    """The name of a tensor of the text model in that model alone; None for one of another part."""
    if name.startswith(OTHERS):
        return None
    for begins, stands in TEXT.items():
        if name.startswith(begins):
            return loaded_name(stands + name.removeprefix(begins))
    return name


def text_names(names: Iterable[str]) -> dict[str, str]:
    """Of tensors of the text model by those that it has alone."""
    return {alone: name for name in names if (alone := text_name(name)) is not None}


def naming(folder: Path) -> Callable[[str], str | None]:
    """What names a tensor of the text model has in it alone: `text_name`, or its own if there is no other part."""
    path = folder / "config.json"
    return text_name if path.is_file() and is_multimodal(read_config_json(path)) else lambda name: name


def text_model(folder: Path, tensors: Mapping[str, StoredTensor]) -> tuple[dict[str, StoredTensor], int]:
    """The tensors of the text model by the names that it has alone, and how many others there are.

    All of them if the folder's config.json is not of a multimodal model. Raises BadInput.
    """
    found: dict[str, StoredTensor] = {}
    name_of = naming(folder)
    for name, tensor in tensors.items():
        if (alone := name_of(name)) is None:
            continue
        if alone in found:
            raise BadInput(f"tensors {found[alone].key} and {tensor.key} are both {alone} of the text model")
        found[alone] = replace(tensor, name=alone)
    return found, len(tensors) - len(found)

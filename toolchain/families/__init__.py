"""The architectures. One file each: `read_config`, `tensors`, `decoder_layer`, `post`, alike in every one."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Protocol

from board.errors import BadInput
from toolchain.config import ModelConfig, Reader
from toolchain.families import llama, qwen2
from toolchain.graph import Graph


class Family(Protocol):
    """What the compiler asks of an architecture."""

    REDUNDANT: tuple[str, ...]  # endings of tensor names a checkpoint may carry and a build does not need

    def read_config(self, reader: Reader) -> ModelConfig: ...

    def tensors(self, config: ModelConfig) -> dict[str, tuple[int, ...]]: ...

    def decoder_layer(self, config: ModelConfig, index: int, positions: int, graph: Graph) -> None: ...

    def post(self, config: ModelConfig, top_k: int, graph: Graph) -> None: ...


FAMILIES: dict[str, Any] = {"qwen2": qwen2, "llama": llama}


def find(model_type: object, path: Path) -> Family:
    """The family of a config.json's model_type. Raises BadInput naming the supported ones and the nearest."""
    if isinstance(model_type, str) and model_type in FAMILIES:
        family: Family = FAMILIES[model_type]
        return family
    near = difflib.get_close_matches(str(model_type), FAMILIES, 1, 0.3)
    raise BadInput(
        f"{path}: model_type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}\n"
        + (f"The nearest is {near[0]}: if the architecture is the same, pass --model_type {near[0]}. " if near else "")
        + f"To add it, write toolchain/families/{str(model_type).replace('-', '_')}.py."
    )

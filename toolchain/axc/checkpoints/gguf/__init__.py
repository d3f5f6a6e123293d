"""GGUF: llama.cpp's format of a whole model in one file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axc.checkpoints.gguf import architecture, tokenizer
from axc.checkpoints.gguf.container import Container, Damaged, TensorEntry
from axc.checkpoints.gguf.rows import PACKINGS, PLAIN, Rows, dtype_of
from axc.stored import Grid, StoredTensor
from axrun.errors import BadInput

SUFFIX = ".gguf"
LISTED = 4  # names of templates in a remark


@dataclass(frozen=True)
class Model:
    """An opened file. `tensors` by their Hugging Face names; `slices` by their own."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    slices: Mapping[str, Rows]
    _container: Container

    @classmethod
    def open(cls, path: Path) -> Model:
        """Reads everything but the tensors' data. Raises BadInput if anything is damaged or unknown."""
        file = Container.open(path)
        kind = architecture.find(file)
        config = architecture.config(file, kind)
        tensors: dict[str, StoredTensor] = {}
        slices: dict[str, Rows] = {}
        for entry in file.tensors:
            if entry.name == architecture.ROPE_FREQUENCIES:
                continue
            name = kind.tensor_name(entry.name)
            if name in tensors:
                raise BadInput(f"{path}: {entry.name} and {tensors[name].key} are both {name}")
            slices[entry.name] = _rows(file, entry, kind, config)
            packed = "" if entry.kind.name in PLAIN else entry.kind.name
            tensors[name] = StoredTensor(
                name, dtype_of(entry.kind), entry.shape, path, entry.name, packed, _grid(entry)
            )
        return cls(path, config, tensors, slices, file)

    @functools.cached_property
    def _files(self) -> tempfile.TemporaryDirectory[str]:
        """config.json, tokenizer and template, made from the metadata; removed with the model."""
        made = tempfile.TemporaryDirectory(prefix="axc-gguf-")
        texts = {"config.json": json.dumps(self.config, indent=2, sort_keys=True) + "\n"}
        try:
            texts |= tokenizer.files(self._container)
        except Damaged as error:  # strings are decoded on demand
            raise BadInput(f"{self.path} is not a complete GGUF file: {error}\nDownload it again.") from None
        for name, text in texts.items():
            (Path(made.name) / name).write_text(text, "utf-8", newline="\n")
        return made

    @property
    def folder(self) -> Path:
        """A folder with the text files of a checkpoint. Raises BadInput for an unknown tokenizer."""
        return Path(self._files.name)

    @property
    def remarks(self) -> tuple[str, ...]:
        """Remarks for the user."""
        begins = f"{tokenizer.TEMPLATE}."
        others = sorted(key.removeprefix(begins) for key in self._container.metadata if key.startswith(begins))
        if not others:
            return ()
        listed = ", ".join(f"{name:.40}" for name in others[:LISTED]) + (", ..." if len(others) > LISTED else "")
        if tokenizer.TEMPLATE in self._container.metadata:
            return (f"chat template: the default one is used, not {listed}",)
        return (f"chat template: {listed} exist, but no default: none is used",)

    @property
    def cut(self) -> str | None:
        """The name of its pre-tokenizer."""
        name = self._container.metadata.get("tokenizer.ggml.pre")
        return name if isinstance(name, str) else None


def _grid(entry: TensorEntry) -> Grid | None:
    packing = PACKINGS.get(entry.kind.name)
    return packing.grid if packing and len(entry.shape) == 2 else None


def _rows(file: Container, entry: TensorEntry, kind: architecture.Architecture, config: Mapping[str, Any]) -> Rows:
    part = entry.name.rpartition(".")[0].rpartition(".")[2]
    order = None
    if part in kind.names.permuted:
        heads = config["num_attention_heads"]
        if part == "attn_k":
            heads = config.get("num_key_value_heads", heads)
        if not isinstance(heads, int) or heads < 1 or entry.shape[0] % (2 * heads):
            raise BadInput(
                f"{file.path}: {entry.name} has {entry.shape[0]} rows, which {heads!r:.40} heads do not divide"
            )
        order = architecture.row_order(entry.shape[0], heads)
    return Rows(file.data, entry, order)

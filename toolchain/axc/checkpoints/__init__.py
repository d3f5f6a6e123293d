"""Opens any supported checkpoint format as a Checkpoint: lazy tensors by their Hugging Face names.

A folder with safetensors or PyTorch .bin files, whole or in shards with an index, its weights floats or quantised, or a
GGUF file. Data are read on demand, and no pickle can run code. Tensors have the names that
transformers gives them on loading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from axc.checkpoints import folder, multimodal, quantised, safetensors, torch_bin
from axc.checkpoints.gguf import SUFFIX as GGUF
from axc.checkpoints.gguf import Model
from axc.checkpoints.lora import Lora, merge
from axc.checkpoints.lora import remarks as lora_remarks
from axc.stored import (
    BLOCK_ELEMENTS,
    EMBEDDING,
    HEAD,
    INFINITY,
    STORED_DTYPES,
    Grid,
    LevelRows,
    ReorderedRows,
    Rows,
    StoredTensor,
    widen,
)
from axrun.errors import BadInput
from axrun.format.dtypes import bf16_to_f32

__all__ = [
    "BLOCK_ELEMENTS",
    "EMBEDDING",
    "HEAD",
    "INFINITY",
    "STORED_DTYPES",
    "Checkpoint",
    "Grid",
    "Lora",
    "StoredTensor",
    "widen",
]

FORMS = {".safetensors": safetensors, ".bin": torch_bin}  # by suffix of a folder's weight files


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. `tensors` by name; `files` are the weight files, in order of name.

    `aside` names weight files in the folder that are not read, `source` the file or index that was preferred.
    `others` counts the tensors of other parts of a multimodal model, which are not read.
    `gguf` is set if the checkpoint is a GGUF file. `adapters` are merged into it. `readers`: by key, how tensors are
    read that are packed or changed. `matrices`: those of a quantised folder; `settings_file` describes them, if
    config.json does not. `remarks` are for the user.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    files: tuple[Path, ...]
    source: str = ""
    aside: tuple[str, ...] = ()
    others: int = 0
    gguf: Model | None = None
    adapters: tuple[Lora, ...] = ()
    settings_file: Path | None = None
    readers: Mapping[str, Rows] = field(default_factory=dict, repr=False, compare=False)
    matrices: tuple[quantised.Matrix, ...] = field(default=(), repr=False, compare=False)
    remarks: tuple[str, ...] = ()
    _arrays: dict[Path, dict[str, NDArray[Any]]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path, adapters: tuple[Lora, ...] = ()) -> Checkpoint:
        """Reads the headers of a checkpoint's weight files and of the adapters to merge into it.

        Raises BadInput if anything is missing or damaged.
        """
        found = cls._opened(path)
        for adapter in adapters:
            found = found._merged(adapter)
        return found

    @classmethod
    def _opened(cls, path: Path) -> Checkpoint:
        if path.suffix == GGUF and path.is_file():
            model = Model.open(path)
            opened = cls(path, model.tensors, (path,), path.name, gguf=model, readers=model.slices)
            return replace(opened, remarks=model.remarks)
        chosen = folder.choose(path)
        tensors: dict[str, StoredTensor] = {}
        for file in chosen.files:
            for stored in sorted(FORMS[file.suffix].headers(file), key=lambda stored: stored.key):
                name = stored.name
                if name in tensors:
                    other = tensors[name]
                    raise BadInput(
                        f"tensor {name} is stored twice: as {other.key} in {other.file.name} "
                        f"and again as {stored.key} in {file.name}"
                    )
                tensors[name] = stored
        plain = cls(path, tensors, chosen.files, chosen.source, chosen.aside)
        settings = quantised.find(path, tensors)
        readers: dict[str, Rows] = {}
        matrices: tuple[quantised.Matrix, ...] = ()
        remarks: tuple[str, ...] = ()
        if settings is not None:
            tensors, matrices, remarks = quantised.present(settings, quantised.Raw(tensors, plain.array))
            readers = {matrix.stored.key: matrix.rows for matrix in matrices}
        tensors, others = multimodal.text_model(path, tensors)
        settings_file = settings.path if settings and settings.path.name in folder.SETTINGS_FILES else None
        if settings_file is not None:
            remarks = (f"quantisation: as {settings_file.name} says; config.json does not describe it", *remarks)
        return replace(
            plain,
            tensors=tensors,
            readers=readers,
            matrices=matrices,
            remarks=remarks,
            others=others,
            settings_file=settings_file,
        )

    def _merged(self, adapter: Lora) -> Checkpoint:
        if adapter.folder.resolve() in [other.folder.resolve() for other in self.adapters]:
            raise BadInput(f"--lora {adapter.folder} is given twice\nGive it once, with a weight: DIR:WEIGHT.")
        changed, readers = merge(adapter, self.tensors, self.rows, multimodal.naming(self.path))
        return replace(
            self,
            tensors={**self.tensors, **changed},
            readers={**self.readers, **readers},
            adapters=(*self.adapters, adapter),
        )

    @property
    def folder(self) -> Path:
        """The folder of config.json, tokenizer and template; for a GGUF, files made from its metadata."""
        return self.gguf.folder if self.gguf else self.path

    def tied(self) -> Checkpoint:
        """The checkpoint of a model that ties head and embedding, under the name of the embedding."""
        if EMBEDDING in self.tensors or HEAD not in self.tensors:
            return self
        embedding = replace(self.tensors[HEAD], name=EMBEDDING)
        others = {name: stored for name, stored in self.tensors.items() if name != HEAD}
        return replace(self, tensors={**others, EMBEDDING: embedding})

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop) along the first dimension as stored; bfloat16 as uint16."""
        stored = self.tensors[name]
        reader = self.readers.get(stored.key)
        return self.array(stored)[start:stop] if reader is None else reader(start, stop)

    def array(self, stored: StoredTensor) -> NDArray[Any]:
        """A tensor as stored, memory-mapped."""
        if stored.file not in self._arrays:
            self._arrays[stored.file] = FORMS[stored.file.suffix].arrays(stored.file)
        return self._arrays[stored.file][stored.key]

    def levels(self, name: str, start: int, stop: int) -> Iterator[tuple[NDArray[Any], ...]]:
        """Rows [start, stop) of a tensor with a grid, in blocks: levels, scales, and zero points if it has any."""
        stored = self.tensors[name]
        reader = cast(LevelRows, self.readers[stored.key])
        height = max(BLOCK_ELEMENTS // stored.shape[1], 1)
        for first in range(start, stop, height):
            levels, scales, *zeros = reader.levels(first, min(first + height, stop))
            _refuse_non_finite(name, scales, stored, first)
            yield levels, scales, *zeros

    def order(self, name: str) -> NDArray[np.int64]:
        """The column order of `levels`."""
        return cast(ReorderedRows, self.readers[self.tensors[name].key]).order()

    def lora_remarks(self) -> list[str]:
        """Remarks on the adapters. Raises BadInput."""
        name_of = multimodal.naming(self.path)
        return [line for adapter in self.adapters for line in lora_remarks(adapter, self.path, self.tensors, name_of)]

    def scale_remarks(self) -> list[str]:
        """Remarks on the scales of a quantised folder; reads all of them. Raises BadInput."""
        return quantised.scales.remarks(self.matrices)

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same values; read in blocks. Raises BadInput for values that are not finite."""
        a, b = self.tensors[one], self.tensors[other]
        if a.shape != b.shape:
            return False
        for start, block in self.blocks(one):
            beside = self.rows(other, start, start + len(block))
            if not np.array_equal(_values(block, a.dtype), _values(beside, b.dtype)):
                return False
        return True

    def blocks(self, name: str, rows: int = 1) -> Iterator[tuple[int, NDArray[Any]]]:
        """The tensor in blocks of whole rows, as stored: (first row, block). Block heights are multiples of `rows`."""
        shape = self.tensors[name].shape
        width = int(np.prod(shape[1:], dtype=np.int64)) if len(shape) > 1 else 1
        height = max(BLOCK_ELEMENTS // max(width, 1) // rows, 1) * rows
        for start in range(0, shape[0], height):
            yield start, self.finite_rows(name, start, min(start + height, shape[0]))

    def dtype(self, name: str) -> str:
        """The element type of a tensor, as ONNX names it."""
        return self.tensors[name].dtype

    def finite_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """As `rows`. Raises BadInput for values that are not finite."""
        block = self.rows(name, start, stop)
        _refuse_non_finite(name, block, self.tensors[name], start)
        return block


def _values(block: NDArray[Any], dtype: str) -> NDArray[Any]:
    return bf16_to_f32(block) if dtype == "BFLOAT16" else block


def _refuse_non_finite(name: str, block: NDArray[Any], stored: StoredTensor, start: int) -> None:
    """Two maxima, no temporary array: as signed integers positive values are largest, as unsigned negative ones."""
    size, infinity = block.itemsize, INFINITY[stored.dtype]
    sign = 1 << (8 * size - 1)
    if block.view(f"i{size}").max(initial=0) >= infinity or block.view(f"u{size}").max(initial=0) >= sign | infinity:
        where = np.argwhere((block.view(f"u{size}") & np.array(infinity, f"u{size}")) == infinity)[0]
        where[0] += start
        raise BadInput(
            f"tensor {name} of {stored.file.name} holds a value that is not finite at {where.tolist()}\n"
            "The checkpoint is damaged or its training diverged; get it again."
        )

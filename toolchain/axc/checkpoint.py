"""A Hugging Face checkpoint on disk: which tensors it has, and their rows on demand.

safetensors and PyTorch .bin, in one file or in shards with an index. Nothing is read before it is asked for, and
no pickle can run code: .bin files go through torch's weights_only loader. Tensors have the names transformers gives
them on loading.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from axc import weight_files
from axrun.errors import BadInput
from axrun.format.dtypes import DTYPES, bf16_to_f32

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# safetensors' names of the element types a checkpoint may hold -> ONNX's
STORED_DTYPES = {"F32": "FLOAT", "F16": "FLOAT16", "BF16": "BFLOAT16", "F64": "DOUBLE"}
TORCH_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
BLOCK_ELEMENTS = 1 << 16  # read at a time: three float32 blocks of these stay in a core's L2 cache

Slice = Callable[[int, int], NDArray[Any]]


@dataclass(frozen=True)
class StoredTensor:
    """What the checkpoint says of a tensor before its data are read. `key` is its name in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    key: str


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder. `tensors` by name; `files` are the weight files, in order of name.

    `aside` names weight files that lie in the folder and are not read, `source` the file or index that was preferred.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    files: tuple[Path, ...]
    source: str = ""
    aside: tuple[str, ...] = ()
    _slices: dict[Path, dict[str, Slice]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Reads the headers of a checkpoint's weight files. Raises BadInput for anything missing or damaged."""
        chosen = weight_files.choose(path)
        tensors: dict[str, StoredTensor] = {}
        for file in chosen.files:
            for stored in sorted(LOADERS[file.suffix][0](file), key=lambda stored: stored.key):
                name = stored.name
                if name in tensors:
                    other = tensors[name]
                    raise BadInput(
                        f"tensor {name} is stored twice: as {other.key} in {other.file.name} "
                        f"and again as {stored.key} in {file.name}"
                    )
                tensors[name] = stored
        return cls(path, tensors, chosen.files, chosen.source, chosen.aside)

    def tied(self) -> Checkpoint:
        """The checkpoint of a model that ties head and embedding: either may be the one that is stored."""
        if EMBEDDING in self.tensors or HEAD not in self.tensors:
            return self
        embedding = replace(self.tensors[HEAD], name=EMBEDDING)
        others = {name: stored for name, stored in self.tensors.items() if name != HEAD}
        return replace(self, tensors={**others, EMBEDDING: embedding})

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop) along the first dimension as stored; bfloat16 as uint16."""
        stored = self.tensors[name]
        if stored.file not in self._slices:
            self._slices[stored.file] = LOADERS[stored.file.suffix][1](stored.file)
        return self._slices[stored.file][stored.key](start, stop)

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
        """What `rows` gives. Raises BadInput for values that are not finite."""
        block = self.rows(name, start, stop)
        _refuse_non_finite(name, block, self.tensors[name], start)
        return block


def _values(block: NDArray[Any], dtype: str) -> NDArray[Any]:
    return bf16_to_f32(block) if dtype == "BFLOAT16" else block


def widen(block: NDArray[Any], dtype: str, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """A stored block as float32 (exact but for float64), in `out` where one is given. Raises OverflowError."""
    if dtype == "BFLOAT16":
        return bf16_to_f32(block, out)
    out = np.empty(block.shape, np.float32) if out is None else out
    with np.errstate(over="ignore"):  # said below, with the value
        np.copyto(out, block, casting="same_kind")
    if dtype == "DOUBLE" and not np.isfinite(out).all():
        raise OverflowError(f"{block.flat[np.abs(block).argmax()]:g}, too large for float32")
    return out


# the bits of positive infinity; whatever is not finite lies at or above them, behind the sign
INFINITY = {"FLOAT": 0x7F800000, "FLOAT16": 0x7C00, "BFLOAT16": 0x7F80, "DOUBLE": 0x7FF0000000000000}


def _refuse_non_finite(name: str, block: NDArray[Any], stored: StoredTensor, start: int) -> None:
    """Two maxima and no temporary: as signed integers the positive values are on top, as unsigned the negative ones."""
    size, infinity = block.itemsize, INFINITY[stored.dtype]
    sign = 1 << (8 * size - 1)
    if block.view(f"i{size}").max(initial=0) >= infinity or block.view(f"u{size}").max(initial=0) >= sign | infinity:
        where = np.argwhere((block.view(f"u{size}") & np.array(infinity, f"u{size}")) == infinity)[0]
        where[0] += start
        raise BadInput(
            f"tensor {name} of {stored.file.name} holds a value that is not finite at {where.tolist()}\n"
            "The checkpoint is damaged or its training diverged; get it again."
        )


def _stored(file: Path, key: str, dtype: str, shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor(_loaded_name(key), STORED_DTYPES.get(dtype, dtype), shape, file, key)


# what stands directly under a base model, such as LlamaModel, and under `model.` in a causal language model
BASE_MODEL = ("embed_tokens", "layers", "norm")


def _loaded_name(key: str) -> str:
    """The name transformers gives a tensor: it adds or removes the base model's prefix (`rename_source_key`)."""
    if key == f"model.{HEAD}":
        return HEAD
    return f"model.{key}" if key.partition(".")[0] in BASE_MODEL else key


def _open_safetensors(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="numpy").__enter__()
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(
            f"cannot read {file}: {error}\nIt is truncated or no safetensors file; download it again."
        ) from None


def _safetensors_headers(file: Path) -> list[StoredTensor]:
    opened = _open_safetensors(file)
    headers = []
    for key in opened.keys():  # noqa: SIM118 - not a mapping
        view = opened.get_slice(key)
        headers.append(_stored(file, key, view.get_dtype(), tuple(view.get_shape())))
    return headers


def _safetensors_slices(file: Path) -> dict[str, Slice]:
    """Views of the file's memory map; the library's own slices are copies, and it has held the header to the file."""
    _open_safetensors(file)
    mapped = np.memmap(file, np.uint8, "r")
    begin = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
    header = json.loads(mapped[8:begin].tobytes())
    header.pop("__metadata__", None)

    def slicer(entry: dict[str, Any]) -> Slice:
        # only tensors of a float type are ever asked for: config.load has refused the others
        first, last = entry["data_offsets"]
        carrier = np.dtype(DTYPES[STORED_DTYPES[entry["dtype"]]].numpy)
        whole = mapped[begin + first : begin + last].view(carrier).reshape(entry["shape"])
        return lambda start, stop: whole[start:stop]

    return {name: slicer(entry) for name, entry in header.items() if entry["dtype"] in STORED_DTYPES}


def _load_bin(file: Path) -> dict[str, Any]:
    """name -> torch tensor, memory-mapped where the file allows it."""
    import pickle

    try:
        import torch
    except ImportError:
        raise BadInput(
            f"{file.name} needs torch to be read, and torch is not installed\n"
            "Run `make setup`, or convert the checkpoint to safetensors."
        ) from None
    try:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            loaded = torch.load(file, map_location="cpu", weights_only=True)  # torch < 1.6 wrote no zip archive
    except Exception as error:  # the loader names no limit to what a damaged file raises
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise BadInput(
                f"{file} is refused: its pickle asks for more than tensors, and could run code\n"
                "Use a safetensors checkpoint, or one from somebody you trust."
            ) from None
        reason = "" if isinstance(error, pickle.UnpicklingError) else str(error).strip()[:200].partition("\n")[0]
        raise BadInput(
            f"cannot read {file}: {type(error).__name__} {reason}\nIt is damaged or cut off; download it again."
        ) from None
    nested = [str(key) for key, value in loaded.items() if isinstance(value, dict)] if isinstance(loaded, dict) else []
    if nested:
        raise BadInput(
            f"{file} holds more than a model: its entry {nested[0]!r:.60} is a dictionary of its own\n"
            "Save that entry, the model's state_dict, alone."
        )
    dense = isinstance(loaded, dict) and all(
        isinstance(name, str)
        and isinstance(tensor, torch.Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        for name, tensor in loaded.items()
    )
    if not dense:
        raise BadInput(f"{file} is not a dictionary of dense tensors by name\nSave the model's state_dict.")
    # a tensor may be stored as the negative or the conjugate of its bytes
    return {name: tensor.detach().resolve_conj().resolve_neg() for name, tensor in loaded.items()}


def _bin_headers(file: Path) -> list[StoredTensor]:
    return [
        _stored(file, key, TORCH_DTYPES.get(str(tensor.dtype)[6:], str(tensor.dtype)), tuple(tensor.shape))
        for key, tensor in _load_bin(file).items()
    ]


def _bin_slices(file: Path) -> dict[str, Slice]:
    import torch

    def slicer(tensor: Any) -> Slice:
        bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor

        def rows(start: int, stop: int) -> NDArray[Any]:
            array = np.ascontiguousarray(bits[start:stop].numpy())
            return array.view(np.uint16) if tensor.dtype == torch.bfloat16 else array

        return rows

    return {name: slicer(tensor) for name, tensor in _load_bin(file).items()}


# by suffix: what reads the headers, what gives slices
LOADERS: dict[str, tuple[Callable[[Path], list[StoredTensor]], Callable[[Path], dict[str, Slice]]]] = {
    ".safetensors": (_safetensors_headers, _safetensors_slices),
    ".bin": (_bin_headers, _bin_slices),
}

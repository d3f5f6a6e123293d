"""The calibration file: levels and scales of a checkpoint's matrices, as a build writes them into axmodels.

One safetensors file. `<weight>` is uint8 [out, in / 2], two 4-bit levels to a byte, the first in the low half, or int8
[out, in]; `<weight>_scale` float16 [out, in / block]. Its metadata has one key, `calibration`, a JSON object.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray
from safetensors.numpy import save_file

from axc.checkpoints import BLOCK_ELEMENTS, EMBEDDING, HEAD, Checkpoint
from axc.quantizer.kept import Kept
from axc.weights import Source
from axrun.errors import BadInput
from axrun.format.bundle import sha256
from axrun.format.quantised import pack4, unpack4

VERSION = 2
KEY = "calibration"
SLACK = 1e-3
OTHER = "Give the checkpoint that it was made from, or calibrate this one: axc calibrate."
TYPES = {"s4": "INT4", "s8": "INT8"}


@dataclass(frozen=True)
class Calibrated:
    """How a matrix is stored. `error`: relative, of the weights; `output_error`: of what it gives on the text."""

    type: str
    block: int
    bits: float
    error: float
    output_error: float

    def kept(self, name: str) -> Kept:
        return Kept(TYPES[self.type], self.block, name, "calibration", "FLOAT16", calibrated=True)

    def disagrees(self, error: float) -> bool:
        """Whether a relative error of the weights is another than the recorded one, which has four digits."""
        return abs(error - self.error) > SLACK * (self.error + SLACK)


@dataclass(frozen=True)
class CalibrationFile:
    """An opened file. `header` is its metadata without the weights."""

    path: Path
    sha256: str
    header: Mapping[str, Any]
    weights: Mapping[str, Calibrated]

    @classmethod
    def open(cls, path: Path) -> CalibrationFile:
        """Reads and checks all of it. Raises BadInput."""
        try:
            with safetensors.safe_open(path, "np") as file:
                header = json.loads((file.metadata() or {})[KEY])
                if header["version"] != VERSION:
                    raise BadInput(f"{path} is a calibration of version {header['version']!a:.20}; expected {VERSION}")
                weights = {name: Calibrated(**entry) for name, entry in header["weights"].items()}
                names = set(file.keys())
                for name, entry in weights.items():
                    _check(path, file, name, entry, names)
                if payload_digest({name: file.get_tensor(name) for name in sorted(names)}) != header["payload"]:
                    raise BadInput(f"{path} is damaged: its levels or scales are not those that were written")
        except BadInput:
            raise
        except OSError as error:
            raise BadInput(f"cannot read {path}: {error.strerror or error}") from None
        except Exception as error:  # damaged in any way; safetensors' own error has no common base
            words = f"{type(error).__name__}: {error}"
            raise BadInput(f"{path} is no calibration file: {words:.120}\nMake it with axc calibrate.") from None
        rest = {key: value for key, value in header.items() if key != "weights"}
        return cls(path, sha256(path), rest, weights)

    @property
    def weight_type(self) -> str:
        """The type of most of the layers' weights."""
        return str(self.header["algorithm"]["weight_type"])

    @property
    def bits(self) -> float:
        """Per weight of a layer, scales included, over all that are calibrated."""
        return float(self.header["bits"])

    def require(self, checkpoint: Checkpoint, sources: Mapping[str, Source]) -> None:
        """Raises BadInput unless the file was made from this checkpoint."""
        for name, entry in self.weights.items():
            source = sources.get(name)
            if source is None or len(source.shape) != 2 or source.shape[1] % entry.block:
                raise BadInput(f"{self.path} has a {name}, which is no matrix of {checkpoint.path}\n{OTHER}")
            with safetensors.safe_open(self.path, "np") as file:
                if self._shape(file, name)[0] != source.shape:
                    raise BadInput(f"{self.path} has {name} in another shape than {checkpoint.path}\n{OTHER}")
        if checkpoint_digest(checkpoint, sources) != self.header.get("checkpoint"):
            raise BadInput(
                f"{self.path} was made from another checkpoint than {checkpoint.path}: its weights differ\n" + OTHER
            )

    def with_head_in(self, weight_type: str | None) -> CalibrationFile:
        """Without the head if `weight_type` asks for another type than the file's."""
        weights = {
            name: entry
            for name, entry in self.weights.items()
            if name not in (EMBEDDING, HEAD) or weight_type in (None, entry.type)
        }
        return replace(self, weights=weights)

    def kept(self) -> dict[str, Kept]:
        """How the compiler stores its matrices."""
        return {name: entry.kept(name) for name, entry in self.weights.items()}

    def levels(self, name: str, first: int, last: int) -> Iterator[tuple[NDArray[Any], ...]]:
        """Levels int8 [n, in] and scales float32 [n, in / block] of rows [first, last) of a matrix, in blocks."""
        with safetensors.safe_open(self.path, "np") as file:
            (_, columns), levels = self._shape(file, name)
            scales = file.get_slice(f"{name}_scale")
            height = max(BLOCK_ELEMENTS // columns, 1)
            for start in range(first, last, height):
                stop = min(start + height, last)
                part = levels[start:stop]
                part = unpack4(part).reshape(len(part), columns) if part.dtype == np.uint8 else part
                yield part, scales[start:stop].astype(np.float32)

    def _shape(self, file: Any, name: str) -> tuple[tuple[int, int], Any]:
        levels = file.get_slice(name)
        rows, columns = levels.get_shape()
        return (rows, columns * 2 if self.weights[name].type == "s4" else columns), levels

    def require_errors(self, measured: Mapping[str, float]) -> None:
        """Raises BadInput unless the errors of the written matrices are those that the calibration recorded."""
        for name, entry in self.weights.items():
            error = measured.get(name, 0.0)  # a matrix of zeros has none
            if entry.disagrees(error):
                raise BadInput(
                    f"{self.path}: {name} differs from the checkpoint by {error:.4g}; its calibration recorded "
                    f"{entry.error:.4g}\nIts levels are not those of this matrix: calibrate again."
                )

    def manifest(self) -> dict[str, Any]:
        """The entry of a bundle's manifest."""
        return {"sha256": self.sha256, **self.header, "weights": self.listed()}

    def listed(self) -> dict[str, Any]:
        """The matrices, as the metadata has them."""
        return {name: asdict(self.weights[name]) for name in sorted(self.weights)}


def _check(path: Path, file: Any, name: str, entry: Calibrated, names: set[str]) -> None:
    """Raises BadInput where the tensors of a matrix are missing, or of another type or shape than they must be."""
    if entry.type not in TYPES or type(entry.block) is not int or entry.block < 1:
        raise BadInput(f"{path}: {name} has type {entry.type!a:.20} in blocks of {entry.block!a:.20}")
    if not {name, f"{name}_scale"} <= names:
        raise BadInput(f"{path}: the levels or scales of {name} are missing")
    levels, scales = file.get_slice(name), file.get_slice(f"{name}_scale")
    rows, columns = levels.get_shape()
    columns *= 2 if entry.type == "s4" else 1
    wanted = "U8" if entry.type == "s4" else "I8"
    if levels.get_dtype() != wanted or scales.get_dtype() != "F16" or columns % entry.block:
        raise BadInput(
            f"{path}: {name} is stored as {levels.get_dtype()} and {scales.get_dtype()}; expected {wanted}, F16"
        )
    if list(scales.get_shape()) != [rows, columns // entry.block]:
        raise BadInput(
            f"{path}: {name}_scale has shape {list(scales.get_shape())}, expected {[rows, columns // entry.block]}"
        )
    found = scales[:]
    if not np.isfinite(found).all() or not found.all():
        raise BadInput(f"{path}: {name}_scale has a scale that is 0 or not finite")


def entries(manifest: Mapping[str, Any]) -> dict[str, Calibrated]:
    """The matrices of a bundle that were calibrated, by its manifest. Raises BadInput."""
    try:
        listed = manifest.get("calibration", {"weights": {}})["weights"].items()
        return {name: Calibrated(**entry) for name, entry in listed}
    except (AttributeError, KeyError, TypeError):
        raise BadInput(
            "manifest.json: its calibration lists no weights\nThe bundle is damaged: build it anew."
        ) from None


def calibrated(manifest: Mapping[str, Any]) -> dict[str, Kept]:
    """How a bundle stores the matrices that were calibrated. Raises BadInput."""
    return {name: entry.kept(name) for name, entry in entries(manifest).items()}


class WithLevels:
    """A checkpoint whose matrices have the levels of a calibration file where that has them."""

    def __init__(self, checkpoint: Checkpoint, file: CalibrationFile) -> None:
        self.checkpoint, self.file = checkpoint, file

    def dtype(self, name: str) -> str:
        return self.checkpoint.dtype(name)

    def finite_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        return self.checkpoint.finite_rows(name, start, stop)

    def levels(self, name: str, start: int, stop: int) -> Iterator[tuple[NDArray[Any], ...]]:
        """Of the checkpoint where it is quantised itself."""
        return (self.file if name in self.file.weights else self.checkpoint).levels(name, start, stop)

    def order(self, name: str) -> NDArray[np.int64]:
        """Calibrated matrices have their columns in the checkpoint's order."""
        return self.checkpoint.order(name)


def checkpoint_digest(checkpoint: Checkpoint, sources: Mapping[str, Source]) -> str:
    """SHA-256 over the tensors that the weights are made of: names, types, shapes, values. Raises BadInput."""
    whole = hashlib.sha256()
    names = {name for source in sources.values() for name in source.reads}
    for name in sorted(names):
        stored = checkpoint.tensors[name]
        whole.update(f"{name} {stored.dtype} {list(stored.shape)}\n".encode())
        for _, block in checkpoint.blocks(name):
            whole.update(np.ascontiguousarray(block).data)
    return whole.hexdigest()


def payload_digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 over names and values: the metadata's errors hold for these levels and scales alone."""
    whole = hashlib.sha256()
    for name in sorted(arrays):
        whole.update(f"{name}\n".encode())
        whole.update(np.ascontiguousarray(arrays[name]).data)
    return whole.hexdigest()


def save(path: Path, arrays: Mapping[str, NDArray[Any]], header: Mapping[str, Any]) -> None:
    """Writes a file beside `path` and renames it. Raises BadInput."""
    part = path.with_name(path.name + ".part")
    header = {**header, "payload": payload_digest(arrays)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # one key: safetensors writes several in no fixed order
        save_file(dict(arrays), part, {KEY: json.dumps(header, sort_keys=True)})
        part.replace(path)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)


def packed(levels: NDArray[np.int8], weight_type: str) -> NDArray[Any]:
    """Levels [out, in] as the file holds them."""
    return pack4(levels).reshape(len(levels), -1) if weight_type == "s4" else levels

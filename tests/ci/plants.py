"""Plants faults in a bundle and updates the manifest, so that only measurements can find them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from axrun.format import axmodel
from axrun.format.bundle import MANIFEST, read_manifest, sha256


def flip_a_scale(bundle: Path, layer: int = 2) -> None:
    """The scale of one row of a quantised matrix gets the other sign."""
    name = _layers(bundle)[layer]
    tensors = axmodel.read(bundle / name).initializers
    scale = next(entry for key, entry in tensors.items() if "down_proj" in key and entry.dtype in ("FLOAT", "FLOAT16"))
    size = np.dtype({"FLOAT": np.float32, "FLOAT16": np.float16}[scale.dtype]).itemsize
    with (bundle / name).open("r+b") as stream:
        stream.seek(scale.offset + size - 1)  # little-endian: the sign is in the last byte
        sign = stream.read(1)[0] ^ 0x80
        stream.seek(scale.offset + size - 1)
        stream.write(bytes([sign]))
    agree(bundle, name)


def zero_rotary(bundle: Path, position: int) -> None:
    """In every layer, sine and cosine are zero from a position on that begins a row of the high tables."""
    for name in _layers(bundle):
        tensors = axmodel.read(bundle / name).initializers
        with (bundle / name).open("r+b") as stream:
            first, rest = divmod(position, int(tensors["rotary.low.rows"].array()))
            assert not rest
            for table in (tensors["rotary.high.cos"], tensors["rotary.high.sin"]):
                row = table.nbytes // table.dims[0]
                stream.seek(table.offset + first * row)
                stream.write(bytes((table.dims[0] - first) * row))
        agree(bundle, name)


def agree(bundle: Path, *names: str) -> None:
    """Makes the manifest say what the files are."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    for name in names:
        manifest["files"][name].update(sha256=sha256(bundle / name), size=(bundle / name).stat().st_size)
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def _layers(bundle: Path) -> list[str]:
    model = read_manifest(bundle)["model"]
    return [model["layer_file"].replace("%d", str(index)) for index in range(model["layers"])]

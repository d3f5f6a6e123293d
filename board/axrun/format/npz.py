"""Arrays and a JSON object in an uncompressed .npz that numpy opens without pickle.

The same values give the same bytes. Reading takes no more memory than the size of the file.
"""

from __future__ import annotations

import errno
import io
import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from axrun.errors import BadInput

ABOUT = "about.json"
MOST_ABOUT = 1 << 20  # bytes
NO_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest date in a zip file


class Damaged(ValueError):
    """The file has the wrong format; the message says why."""


def encode(arrays: Mapping[str, NDArray[Any]], about: Mapping[str, Any]) -> bytes:
    """The bytes of the file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            with archive.open(_entry(f"{name}.npy"), "w") as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
        archive.writestr(_entry(ABOUT), json.dumps(about, indent=2, ensure_ascii=False) + "\n")
    return buffer.getvalue()


def read(
    path: Path, kinds: Mapping[str, tuple[str, int]], schema: int, most: int | None = None
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Reads the arrays in `kinds`, name -> (kinds of dtype, number of dimensions), and the JSON object of this schema.

    `most`: maximum size in bytes. Raises BadInput if the file cannot be read, Damaged if its format is wrong.
    """
    try:
        if most is not None and path.stat().st_size > most:
            raise Damaged(f"it has {path.stat().st_size:,} bytes, expected at most {most:,}")
        with zipfile.ZipFile(path) as archive:
            stored = _entries(path, archive, kinds)
            arrays = {name: _array(archive, stored[f"{name}.npy"], *kinds[name]) for name in kinds}
            about = json.loads(archive.read(stored[ABOUT]))
    except OSError as error:
        if error.errno == errno.EINVAL:  # zipfile seeks to a negative offset
            raise Damaged("its directory of entries points outside of it") from None
        raise BadInput(f"cannot read {path}: {error.strerror or error}") from None
    except (zipfile.BadZipFile, EOFError, KeyError, ValueError, RecursionError, RuntimeError) as error:
        raise Damaged(str(error)) from None
    if not isinstance(about, dict) or about.get("schema") != schema:
        seen = about.get("schema") if isinstance(about, dict) else about
        raise Damaged(f"it has schema {seen!r:.40}, this reader knows {schema}")
    return arrays, about


def _entry(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, NO_TIME)
    info.create_system, info.external_attr = 3, 0o644 << 16  # the same on every system
    return info


def _entries(path: Path, archive: zipfile.ZipFile, kinds: Mapping[str, Any]) -> dict[str, zipfile.ZipInfo]:
    """The entries by name. All are uncompressed, so that none is larger than the file."""
    expected = {ABOUT, *(f"{name}.npy" for name in kinds)}
    infos = archive.infolist()
    if len(infos) != len(expected) or {info.filename for info in infos} != expected:
        raise ValueError(f"it holds {sorted(info.filename for info in infos)!r:.80}")
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > path.stat().st_size:
            raise ValueError(f"{info.filename} is compressed")
    stored = {info.filename: info for info in infos}
    if stored[ABOUT].file_size > MOST_ABOUT:
        raise ValueError(f"{ABOUT} has {stored[ABOUT].file_size} bytes")
    return stored


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, kinds: str, dimensions: int) -> NDArray[Any]:
    """An array, whose header is checked against the size of the data before memory is allocated."""
    data = io.BytesIO(archive.read(info))
    if np.lib.format.read_magic(data) != (1, 0):
        raise ValueError(f"{info.filename} is not an array of version 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(data)
    rest = info.file_size - data.tell()
    if dtype.kind not in kinds or dtype.itemsize > 4 or len(shape) != dimensions or fortran:
        raise ValueError(f"{info.filename} is {dtype}{list(shape)}")
    if min(shape) < 0 or math.prod(shape) * dtype.itemsize != rest:
        raise ValueError(f"{info.filename} is {dtype}{list(shape)} in {rest} bytes")
    return np.frombuffer(data.getbuffer(), dtype, offset=data.tell()).reshape(shape)

"""safetensors files: headers by the library, data as views of the file's memory map."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from axc.stored import PACKED_DTYPES, STORED_DTYPES, StoredTensor, stored
from axrun.errors import BadInput
from axrun.format.dtypes import DTYPES

CARRIERS = {name: np.dtype(DTYPES[dtype].numpy) for name, dtype in STORED_DTYPES.items()}
CARRIERS |= {name: np.dtype(carrier) for name, carrier in PACKED_DTYPES.items()}


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="numpy").__enter__()
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(
            f"cannot read {file}: {error}\nIt is truncated or no safetensors file; download it again."
        ) from None


def headers(file: Path) -> list[StoredTensor]:
    opened = _open(file)
    found = []
    for key in opened.keys():  # noqa: SIM118 - not a mapping
        view = opened.get_slice(key)
        found.append(stored(file, key, view.get_dtype(), tuple(view.get_shape())))
    return found


def arrays(file: Path) -> dict[str, NDArray[Any]]:
    """Views of the file's memory map: the library's slices are copies. It has checked the header against the file."""
    _open(file)
    mapped = np.memmap(file, np.uint8, "r")
    begin = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
    header = json.loads(mapped[8:begin].tobytes())
    header.pop("__metadata__", None)

    def view(entry: dict[str, Any]) -> NDArray[Any]:
        first, last = entry["data_offsets"]
        whole: NDArray[Any] = mapped[begin + first : begin + last].view(CARRIERS[entry["dtype"]])
        return whole.reshape(entry["shape"])

    # only tensors of these types are ever asked for: config.load and the quantised formats refuse others
    return {name: view(entry) for name, entry in header.items() if entry["dtype"] in CARRIERS}

"""PyTorch .bin files, by torch's weights_only loader: no pickle can run code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from axc.stored import StoredTensor, stored
from axrun.errors import BadInput

TORCH_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
TORCH_DTYPES |= {"int8": "I8", "uint8": "U8", "int32": "I32", "int64": "I64", "float8_e4m3fn": "F8_E4M3"}


def _load(file: Path) -> dict[str, Any]:
    """name -> torch tensor, memory-mapped if the file allows it."""
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


def headers(file: Path) -> list[StoredTensor]:
    return [
        stored(file, key, TORCH_DTYPES.get(str(tensor.dtype)[6:], str(tensor.dtype)), tuple(tensor.shape))
        for key, tensor in _load(file).items()
    ]


def arrays(file: Path) -> dict[str, NDArray[Any]]:
    """Views of the file's memory map if it can be mapped."""
    import torch

    carried = {torch.bfloat16: (torch.int16, np.uint16), torch.float8_e4m3fn: (torch.uint8, np.uint8)}

    def view(tensor: Any) -> NDArray[Any]:
        if tensor.dtype not in carried:
            return np.asarray(tensor.numpy())
        bits, carrier = carried[tensor.dtype]
        return np.asarray(tensor.view(bits).numpy().view(carrier))

    return {name: view(tensor) for name, tensor in _load(file).items() if str(tensor.dtype)[6:] in TORCH_DTYPES}

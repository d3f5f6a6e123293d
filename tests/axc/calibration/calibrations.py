"""What the tests of calibration share: options for tiny-qwen2, and a file's values by its specification."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from axc.calibration.file import KEY
from axc.calibration.options import Options

Floats = NDArray[np.float32]


def options(folder: Path, words: Path, **more: Any) -> Options:
    return Options(folder, **{"calibration": (words,), "tokens": 1024, "window": 64, **more})


def dequantised(path: Path) -> dict[str, Floats]:
    """By what the file's specification says, not by our reader."""
    found = {}
    with safe_open(path, "np") as file:
        for name, entry in json.loads(file.metadata()[KEY])["weights"].items():
            levels, scales = file.get_tensor(name), file.get_tensor(f"{name}_scale").astype(np.float32)
            if entry["type"] == "s4":
                levels = np.stack([levels & 15, levels >> 4], axis=-1).reshape(len(levels), -1).astype(np.int8)
                levels = np.where(levels > 7, levels - 16, levels)
            blocks = levels.reshape(*scales.shape, entry["block"]).astype(np.float32)
            found[name] = (blocks * scales[..., None]).reshape(levels.shape)
    return found

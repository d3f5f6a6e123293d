"""A script: runs axmodels in the engine and in onnxruntime, and prints the largest difference of each.

Arguments: axmodel files. Prints a line for each: path, hidden type, and largest |difference| / largest |value|.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from axrun.format import axmodel
from axrun.format.dtypes import from_float32, to_float32
from axrun.session import ax_engine, libax_engine, ort


def exact(path: Path) -> ort.OrtSession:
    """The unchanged file in onnxruntime, without optimisers, so that it does not round activations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.open_session(path, lowered=False)
    session._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session


def filled(session: Any, group: int, seed: int = 0) -> dict[str, Any]:
    """All arrays of a group, with random inputs; the mask hides the newer half of the history."""
    random = np.random.default_rng(seed)
    shape = session.groups[group]
    arrays = {info.name: session.allocate(info) for info in shape.inputs + shape.outputs}
    for info in shape.inputs:
        if info.name == "indices":
            arrays["indices"][0] = np.arange(shape.history, shape.history + shape.tokens)
        elif info.name == "mask":
            mask = np.zeros(info.shape, np.float32)
            mask[0, :, shape.history // 2 : shape.history] = -65504
            mask[0, :, shape.history :][np.triu_indices(shape.tokens, 1)] = -65504
            arrays["mask"][...] = from_float32(mask, info.dtype)
        else:
            arrays[info.name][...] = from_float32(random.standard_normal(info.shape, np.float32), info.dtype)
    return arrays


def worst(path: Path) -> float:
    ours, plain = ax_engine.open_session(path), exact(path)
    difference = 0.0
    for group in ours.groups:
        seen = filled(ours, group.index)
        wanted = {name: array.copy() for name, array in seen.items()}
        ours.bind(group.index, seen).run()
        plain.bind(group.index, wanted).run()
        for info in group.outputs:
            if info.dtype == "INT32":
                assert (seen[info.name] == wanted[info.name]).all(), (path, info.name)
                continue
            a, b = (to_float32(arrays[info.name], info.dtype) for arrays in (seen, wanted))
            assert np.abs(b).max() > 1e-3, (path, info.name)
            error = np.abs(a - b).max() / np.abs(b).max()
            difference = max(difference, float(error) if np.isfinite(error) else np.inf)
    return difference


def main() -> None:
    print(libax_engine.library().isa)
    for path in map(Path, sys.argv[1:]):
        print(path, axmodel.read(path).metadata["axmodel.hidden_state_type"], worst(path))


if __name__ == "__main__":
    main()

"""A script: runs samples of operators in the engine. Argument: the pickle of a list of operator_models.Sample.

Prints the name of the kernels, then a line for each wrong sample: operator, name and error.
"""

from __future__ import annotations

import pickle
import sys
import tempfile
from collections.abc import Sequence
from ctypes import byref, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (types of the arrays that are unpickled)
import numpy as np

from axrun.errors import BadInput
from axrun.session import libax_engine
from tests.engine.operator_models import Sample

GUARD = 64  # guard bytes after an output


def buffers(memory: Sequence[Any]) -> Any:
    made = (libax_engine.IoBuffer * max(len(memory), 1))()
    for buffer, array in zip(made, memory, strict=False):
        buffer.pVirAddr, buffer.nSize = array.ctypes.data, array.nbytes
    return made


def aligned(size: int) -> Any:
    """Zeroed bytes at a multiple of 64."""
    whole = np.zeros(size + 64, np.uint8)
    start = -whole.ctypes.data % 64
    return whole[start : start + size]


def run(sample: Sample, path: Path) -> list[bytes]:
    loaded, handle = libax_engine.library(), c_void_p()
    path.write_bytes(sample.model)
    loaded.call("axc_open", byref(handle), str(path).encode())
    try:
        inputs = [aligned(max(len(data), 1)) for data in sample.inputs]
        for memory, data in zip(inputs, sample.inputs, strict=True):
            memory[: len(data)] = np.frombuffer(data, np.uint8)
        outputs = [aligned(array.nbytes + GUARD) for array in sample.outputs]
        for memory in outputs:
            memory[:] = 0xA5
        ins, outs = buffers(inputs), buffers(outputs)
        io = libax_engine.Io(pInputs=ins, nInputSize=len(inputs), pOutputs=outs, nOutputSize=len(outputs))
        code = loaded.engine.axc_run(handle, c_uint32(sample.tokens), c_uint32(sample.history), byref(io))
        if code and code & 0xFFFFFFFF != libax_engine.NOT_FINITE:  # NaN is expected for some
            raise loaded.failure("axc_run", code)
        for memory in outputs:
            assert (memory[-GUARD:] == 0xA5).all(), "written behind an output"
        return [bytes(memory[:-GUARD]) for memory in outputs]
    finally:
        loaded.call("AX_ENGINE_DestroyHandle", handle)


def wrong(sample: Sample, path: Path) -> str:
    """Describes the error of a sample; empty if there is none."""
    loaded = libax_engine.library()
    loaded.reset_counters()
    try:
        made = run(sample, path)
    except (BadInput, AssertionError) as error:
        return str(error)
    if sample.fused and not loaded.counters()[sample.fused][0]:
        return f"no step {sample.fused} ran"
    for index, (data, wanted) in enumerate(zip(made, sample.outputs, strict=True)):
        seen = np.frombuffer(data, wanted.dtype).reshape(wanted.shape)
        if wanted.dtype.kind in "biu":
            same = np.array_equal(seen, wanted)
        else:
            a, b = seen.astype(np.float64), wanted.astype(np.float64)
            same = np.allclose(a, b, rtol=sample.rtol, atol=sample.atol, equal_nan=True)
        if not same:
            flat, other = seen.reshape(-1), wanted.reshape(-1)
            return f"output {index}: {flat[:6].tolist()} for {other[:6].tolist()}"
    return ""


def main() -> None:
    samples: list[Sample] = pickle.loads(Path(sys.argv[1]).read_bytes())
    print(libax_engine.library().isa)
    with tempfile.TemporaryDirectory() as folder:
        for sample in samples:
            seen = wrong(sample, Path(folder, "case.axmodel"))
            if seen:
                print(sample.op, sample.name.replace(" ", ""), seen)


if __name__ == "__main__":
    main()

"""Sessions in libax_engine: our own library on any CPU, the vendor's on a board.

Our library has extensions: it maps the file instead of copying it, and bindings may have any number of tokens and
history. Any other library gets the model as bytes, and bindings have the shapes of its groups.
"""

from __future__ import annotations

import ctypes
import math
import os
import weakref
from collections.abc import Mapping, Sequence
from ctypes import POINTER, byref, c_uint8, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from axrun.errors import BadInput, NotFinite
from axrun.format import axmodel
from axrun.format.axmodel import VENDOR, Axmodel, TensorInfo
from axrun.format.dtypes import DTYPES, nbytes
from axrun.session import CACHES, Array, SessionGroup, libax_engine
from axrun.session.finite import FiniteCheck
from axrun.session.libax_engine import (
    FOLDER,
    NOT_FINITE,
    EngineMissing,
    Io,
    IoBuffer,
    IoInfo,
    IoMeta,
    Library,
    library,
)

ALIGNMENT = 128  # of buffers, as in the vendor's clients
TAG = b"axrun"


@dataclass(frozen=True)
class Block:
    """A memory block of the engine: virtual address, size, and physical address for the NPU."""

    start: int
    size: int
    physical: int


_blocks: dict[int, Block] = {}


def allocate(info: TensorInfo) -> Array:
    """Zeroed memory of AX_SYS_MemAllocCached as an array; freed together with its last view.

    Raises BadInput if this memory is exhausted.
    """
    loaded = library()
    shape = tuple(int(dim) for dim in info.shape)
    size = max(nbytes(info.dtype, shape), 1)
    if size >= 1 << 32:
        raise BadInput(f"{info.name} takes {size:,} bytes; a memory block of the engine has at most 4 GiB")
    physical, address = c_uint64(), c_void_p()
    loaded.call("AX_SYS_MemAllocCached", byref(physical), byref(address), c_uint32(size), c_uint32(ALIGNMENT), TAG)
    start = address.value or 0
    memory = (c_uint8 * size).from_address(start)
    ctypes.memset(start, 0, size)
    _blocks[start] = Block(start, size, physical.value)
    weakref.finalize(memory, _release, loaded, start)
    array: Array = np.frombuffer(memoryview(memory), DTYPES[info.dtype].numpy, count=math.prod(shape)).reshape(shape)
    return array


def _release(loaded: Library, start: int) -> None:
    block = _blocks.pop(start)
    loaded.sys.AX_SYS_MemFree(c_uint64(block.physical), c_void_p(block.start))


def _physical(array: Array) -> int:
    """The physical address of an array in allocated memory; 0 for any other array."""
    address = array.ctypes.data
    for block in _blocks.values():
        if block.start <= address and address + array.nbytes <= block.start + block.size:
            return block.physical + address - block.start
    return 0


class AxBinding:
    """A run with prepared C arguments."""

    def __init__(
        self,
        loaded: Library,
        call: tuple[Any, ...],
        synced: Sequence[Sequence[Any]],
        named: tuple[str, Sequence[str]],
        check: FiniteCheck | None,
        keep: Any,
    ) -> None:
        """`synced`: address, physical address and size of the buffers to flush before and to invalidate after a run.

        `named`: the axmodel and its outputs, for errors. `check` None: the C function checks its outputs itself.
        """
        self._library, self._function, self._arguments = loaded, getattr(loaded.engine, call[0]), call[1:]
        self._name = call[0]
        self._before, self._after = synced
        self._part, self._outputs = named
        self._check = check
        self._keep = keep  # C code holds only their addresses

    def run(self) -> None:
        for arguments in self._before:
            self._library.call("AX_SYS_MflushCache", *arguments)
        code = self._function(*self._arguments)
        if code:
            raise _failure(self._library, self._name, code, self._part, self._outputs)
        for arguments in self._after:
            self._library.call("AX_SYS_MinvalidateCache", *arguments)
        if self._check:
            self._check()


class AxStackedBinding:
    """Rows of several sequences, in our own library."""

    def __init__(self, session: AxSession, io: Io, keep: Any) -> None:
        self._session, self._io, self._keep = session, byref(io), keep
        self._function = session.library.engine.axc_run_segments

    def run(self, segments: int, count: int) -> None:
        session = self._session
        code = self._function(session.handle, c_void_p(segments), c_uint32(count), self._io)
        if code:
            raise _failure(session.library, "axc_run_segments", code, session.part, session.outputs)


def _failure(library: Library, name: str, code: int, part: str, outputs: Sequence[str]) -> BadInput | NotFinite:
    """The error for a run by the function `name` that returned `code`."""
    if code & 0xFFFFFFFF != NOT_FINITE:
        return library.failure(name, code)
    output, row = library.not_finite()
    return NotFinite(part, outputs[output], row)


class AxSession:
    """An axmodel loaded in the engine. `ours`: the parsed file, if it has our format."""

    def __init__(self, loaded: Library, handle: c_void_p, ours: Axmodel | None) -> None:
        self._library, self._handle, self._part = loaded, handle, ours.part if ours else ""
        weakref.finalize(self, loaded.engine.AX_ENGINE_DestroyHandle, handle)
        self.flexible = loaded.extended and ours is not None
        self.exact = self.flexible  # our engine and our axmodel
        self.stacks = self.flexible and bool(loaded.engine.axc_takes_segments(handle))
        self.window = ours.window if ours else 0
        infos = _infos(loaded, handle)
        self._inputs, self._outputs = _names(infos[0])
        self.groups = _file_groups(ours) if ours else _shown_groups(infos)
        self._symbolic = {info.name: info for info in ours.inputs + ours.outputs} if ours else {}
        context = c_void_p()
        loaded.call("AX_ENGINE_CreateContextV2", self._handle, byref(context))
        self._context = context

    def allocate(self, info: TensorInfo) -> Array:
        return allocate(info)

    @property
    def library(self) -> Library:
        return self._library

    @property
    def handle(self) -> c_void_p:
        return self._handle

    @property
    def part(self) -> str:
        """The part of the model, for errors."""
        return self._part

    @property
    def outputs(self) -> Sequence[str]:
        return self._outputs

    def round_activations(self, bits: int) -> None:
        """Sets the precision of activations in products with integer weights: 16 or 8 bits. Our engine only."""
        self._library.call("axc_set_activation_bits", self._handle, c_uint32(bits))

    def bind(self, group: int, arrays: Mapping[str, Array]) -> AxBinding:
        shape = self.groups[group]
        expected = self._expected(shape, arrays)
        unknown = arrays.keys() - expected.keys()
        missing = {info.name for info in shape.inputs} - arrays.keys()
        if unknown or missing:
            raise ValueError(f"{sorted(arrays)} cannot be bound to {sorted(expected)}")
        for name, array in arrays.items():
            info = expected[name]
            if array.shape != info.shape or array.dtype != DTYPES[info.dtype].numpy or not array.flags.c_contiguous:
                raise ValueError(f"{name} is {array.dtype}{list(array.shape)}, expected {info.dtype}{list(info.shape)}")
        bound = dict(arrays)
        if not self.flexible:
            bound.update(self._stand_ins(group, bound))
        inputs, outputs = ((IoBuffer * len(names))() for names in (self._inputs, self._outputs))
        for names, buffers in ((self._inputs, inputs), (self._outputs, outputs)):
            for name, buffer in zip(names, buffers):
                if name in bound:
                    _fill(buffer, bound[name])
        io = Io(pInputs=inputs, nInputSize=len(inputs), pOutputs=outputs, nOutputSize=len(outputs))
        synced: list[list[Any]] = [[], []]
        if not self._library.extended:
            for buffers, list_ in zip((inputs, outputs), synced):
                list_ += [(c_uint64(b.phyAddr), c_void_p(b.pVirAddr), c_uint32(b.nSize)) for b in buffers]
        return AxBinding(
            self._library,
            self._call(group, expected, byref(io)),
            synced,
            (self._part, self._outputs),
            None if self.flexible else FiniteCheck(self._part, shape.outputs, arrays),
            (bound, inputs, outputs, io, self),
        )

    def bind_stacked(self, arrays: Mapping[str, Array]) -> AxStackedBinding:
        if not self.stacks:
            raise ValueError(f"{self._part or 'the axmodel'} runs one sequence at a time")
        rows = arrays["input"].shape[1]
        for name, array in arrays.items():
            info = _sized(self._symbolic[name], rows, 0)
            if array.shape != info.shape or array.dtype != DTYPES[info.dtype].numpy or not array.flags.c_contiguous:
                raise ValueError(f"{name} is {array.dtype}{list(array.shape)}, expected {info.dtype}{list(info.shape)}")
        inputs, outputs = ((IoBuffer * len(names))() for names in (self._inputs, self._outputs))
        for names, buffers in ((self._inputs, inputs), (self._outputs, outputs)):
            for name, buffer in zip(names, buffers):
                if name in arrays:
                    _fill(buffer, arrays[name])
        io = Io(pInputs=inputs, nInputSize=len(inputs), pOutputs=outputs, nOutputSize=len(outputs))
        return AxStackedBinding(self, io, (dict(arrays), inputs, outputs, io))

    def _call(self, group: int, expected: Mapping[str, TensorInfo], io: Any) -> tuple[Any, ...]:
        if self.flexible:
            tokens = int(expected["input"].shape[1])
            history = int(expected["K_cache"].shape[1]) if "K_cache" in expected else 0
            return "axc_run", self._handle, c_uint32(tokens), c_uint32(history), io
        if len(self.groups) == 1:
            return "AX_ENGINE_RunSync", self._handle, io
        return "AX_ENGINE_RunGroupIOSync", self._handle, self._context, c_uint32(group), io

    def _expected(self, group: SessionGroup, arrays: Mapping[str, Array]) -> dict[str, TensorInfo]:
        """The tensor infos of a group, resized to the tokens and history of the arrays if the engine is flexible."""
        infos = {info.name: info for info in group.inputs + group.outputs}
        if not self.flexible or "input" not in arrays or arrays["input"].ndim != 3:
            return infos
        tokens = arrays["input"].shape[1]
        cache = arrays.get("K_cache")
        history = cache.shape[1] if cache is not None and cache.ndim == 3 and "K_cache" in infos else 0
        return {name: _sized(self._symbolic[name], tokens, history) for name in infos}

    def _stand_ins(self, group: int, bound: Mapping[str, Array]) -> dict[str, Array]:
        """Dummy memory for tensors that the engine requires and the caller did not bind: unused caches and outputs."""
        info = _infos(self._library, self._handle)[group]
        metas = [info.pInputs[i] for i in range(info.nInputSize)] + [info.pOutputs[i] for i in range(info.nOutputSize)]
        named = {meta.pName.decode(): meta.nSize for meta in metas}
        return {name: allocate(TensorInfo(name, "UINT8", (size,))) for name, size in named.items() if name not in bound}


def _fill(buffer: IoBuffer, array: Array) -> None:
    buffer.phyAddr, buffer.pVirAddr, buffer.nSize = _physical(array), array.ctypes.data, array.nbytes


def _infos(loaded: Library, handle: c_void_p) -> list[IoInfo]:
    count = c_uint32()
    loaded.call("AX_ENGINE_GetGroupIOInfoCount", handle, byref(count))
    infos = []
    for index in range(count.value):
        info = POINTER(IoInfo)()
        loaded.call("AX_ENGINE_GetGroupIOInfo", handle, c_uint32(index), byref(info))
        infos.append(info.contents)
    return infos


def _names(info: IoInfo) -> tuple[list[str], list[str]]:
    return (
        [info.pInputs[i].pName.decode() for i in range(info.nInputSize)],
        [info.pOutputs[i].pName.decode() for i in range(info.nOutputSize)],
    )


# AX_ENGINE_DATA_TYPE_T; libraries without bfloat16 report 0 for it, as for float16
SHOWN = {
    0: "BFLOAT16",
    1: "UINT8",
    2: "UINT16",
    3: "FLOAT",
    4: "INT16",
    5: "INT8",
    6: "INT32",
    7: "UINT32",
    9: "BFLOAT16",
}


def _shown_groups(infos: Sequence[IoInfo]) -> tuple[SessionGroup, ...]:
    """The groups as the engine describes them. Raises BadInput for an unexpected data type."""
    groups = []
    for index, info in enumerate(infos):
        inputs = [_shown(info.pInputs[i]) for i in range(info.nInputSize)]
        outputs = [_shown(info.pOutputs[i]) for i in range(info.nOutputSize)]
        sizes = {tensor.name: tensor.shape for tensor in inputs}
        tokens = int(sizes["input"][1]) if len(sizes.get("input", ())) == 3 else 1
        history = int(sizes["mask"][2]) - tokens if len(sizes.get("mask", ())) == 3 else 0
        read = tuple(tensor for tensor in inputs if history or tensor.name not in CACHES)
        groups.append(SessionGroup(index, tokens, history, read, tuple(outputs)))
    return tuple(groups)


def _shown(meta: IoMeta) -> TensorInfo:
    name = meta.pName.decode()
    if meta.eDataType not in SHOWN:
        raise BadInput(f"the engine reports data type {meta.eDataType} for {name}, which no layer uses")
    return TensorInfo(name, SHOWN[meta.eDataType], tuple(meta.pShape[i] for i in range(meta.nShapeSize)))


def _sized(info: TensorInfo, tokens: int, history: int) -> TensorInfo:
    """`info` with M and T as numbers."""
    sizes: dict[int | str, int] = {"M": tokens, "T": history, "T+M": history + tokens}
    return TensorInfo(info.name, info.dtype, tuple(sizes.get(dim, dim) for dim in info.shape))


def _file_groups(model: Axmodel) -> tuple[SessionGroup, ...]:
    groups = []
    for group in model.groups:
        inputs = (info for info in model.inputs if group.history or info.name not in CACHES)
        groups.append(
            SessionGroup(
                group.index,
                group.tokens,
                group.history,
                tuple(_sized(info, group.tokens, group.history) for info in inputs),
                tuple(_sized(info, group.tokens, group.history) for info in model.outputs),
            )
        )
    return tuple(groups)


def open_session(path: str | os.PathLike[str], threads: int | None = None) -> AxSession:
    """Loads an axmodel into the engine. `threads` applies to the whole process, and to our own library only.

    Raises BadInput if there is no engine or it refuses the file.
    """
    model = axmodel.read(path)
    loaded = library() if model.ours else _boards_library(path, model)
    if loaded.extended:
        loaded.call("axc_set_threads", c_uint32(threads or 0))
    return open_with(loaded, path, model)


def _boards_library(path: str | os.PathLike[str], model: Axmodel) -> Library:
    """The library for an axmodel that is not ours. Raises BadInput if this machine has none."""
    try:
        loaded = library(ours=False)
    except EngineMissing:
        loaded = None
    if loaded is None or loaded.extended:  # our library runs only our axmodels
        name = os.fspath(path)
        if not model.vendors:
            raise BadInput(
                f"{name} is made by {model.producer_name or 'an unknown compiler'}, expected axc or {VENDOR}"
            )
        raise BadInput(
            f"{name} is made by {VENDOR} {model.version}".rstrip()
            + ": it is code for an NPU, and needs a board with one\n"
            f"Run it on the board, whose libax_engine is in {libax_engine.BOARD} (or where {FOLDER} says). "
            "For this machine build the checkpoint with `axc llm_build`."
        )
    return loaded


def version() -> str:
    """Version string of the engine for our axmodels, and the instruction set in use. Raises BadInput."""
    loaded = library()
    return f"{loaded.engine.AX_ENGINE_GetVersion().decode('utf-8', 'replace')} {loaded.isa}".strip()


def open_with(loaded: Library, path: str | os.PathLike[str], model: Axmodel) -> AxSession:
    """Loads a parsed axmodel into a given engine. Raises BadInput if the engine refuses the file."""
    handle = c_void_p()
    if loaded.extended:
        loaded.call("axc_open", byref(handle), os.fsencode(path))
    else:
        data = Path(path).read_bytes()
        loaded.call("AX_ENGINE_CreateHandle", byref(handle), data, c_uint32(len(data)))
    return AxSession(loaded, handle, model if model.ours else None)

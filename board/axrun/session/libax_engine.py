"""ctypes bindings of libax_engine: the C structures, and the library itself, loaded once per process.

The library is ours on any CPU, or the vendor's on a board; both have the same name.
"""

from __future__ import annotations

import atexit
import ctypes
import os
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_uint8, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axrun.errors import BadInput

FOLDER = "AXRUN_ENGINE"  # environment variable with the folder of the libraries
_PACKAGE = Path(__file__).resolve().parents[1]
# Our library: inside the package in a wheel, or in the output folder of `make engine` in a checkout.
_CHECKOUT = (_PACKAGE.parent / "engine" / "build.py").is_file()
BESIDE = (_PACKAGE.parent if _CHECKOUT else _PACKAGE) / "engine" / "lib"
BOARD = Path("/soc/lib")  # the vendor's library on a board; the dynamic linker may search other folders too
EXTENSIONS = 4  # the version of axc_engine.h that this file implements
NOT_FINITE = 0x80060080  # AXC_ENGINE_NOT_FINITE


class IoBuffer(ctypes.Structure):
    """AX_ENGINE_IO_BUFFER_T"""

    _fields_ = (
        ("phyAddr", c_uint64),
        ("pVirAddr", c_void_p),
        ("nSize", c_uint32),
        ("pStride", c_void_p),
        ("nStrideSize", c_uint8),
        ("u64Reserved", c_uint64 * 11),
    )


class Io(ctypes.Structure):
    """AX_ENGINE_IO_T"""

    _fields_ = (
        ("pInputs", POINTER(IoBuffer)),
        ("nInputSize", c_uint32),
        ("pOutputs", POINTER(IoBuffer)),
        ("nOutputSize", c_uint32),
        ("nBatchSize", c_uint32),
        ("pIoSetting", c_void_p),
        ("nParallelRun", c_uint32),
        ("u64Reserved", c_uint64 * 10),
    )


class IoMeta(ctypes.Structure):
    """AX_ENGINE_IOMETA_T"""

    _fields_ = (
        ("pName", c_char_p),
        ("pShape", POINTER(c_int32)),
        ("nShapeSize", c_uint8),
        ("eLayout", c_int),
        ("eMemoryType", c_int),
        ("eDataType", c_int),
        ("pExtraMeta", c_void_p),
        ("nSize", c_uint32),
        ("nQuantizationValue", c_uint32),
        ("pStride", c_void_p),
        ("u64Reserved", c_uint64 * 9),
    )


class IoInfo(ctypes.Structure):
    """AX_ENGINE_IO_INFO_T"""

    _fields_ = (
        ("pInputs", POINTER(IoMeta)),
        ("nInputSize", c_uint32),
        ("pOutputs", POINTER(IoMeta)),
        ("nOutputSize", c_uint32),
        ("nMaxBatchSize", c_uint32),
        ("bDynamicBatchSize", c_int32),
        ("u64Reserved", c_uint64 * 11),
    )


class NpuAttr(ctypes.Structure):
    """AX_ENGINE_NPU_ATTR_T"""

    _fields_ = (("eHardMode", c_int), ("reserve", c_uint32 * 8))


class Counter(ctypes.Structure):
    """axc_counter"""

    _fields_ = (("kind", c_char_p), ("calls", c_uint64), ("nanoseconds", c_uint64))


class EngineMissing(BadInput):
    """No libax_engine.so was found."""


@dataclass(frozen=True)
class Library:
    """libax_sys and libax_engine, initialised, and their folder. `extended`: the engine is ours."""

    sys: Any
    engine: Any
    extended: bool
    folder: str = ""

    def call(self, name: str, *arguments: Any) -> None:
        """Calls a function of either library. Raises BadInput with the error code and the engine's message."""
        library = self.sys if name.startswith("AX_SYS") else self.engine
        code = getattr(library, name)(*arguments)
        if code:
            raise self.failure(name, code)

    def not_finite(self) -> tuple[int, int]:
        """The output index and row, after a run of this thread returned NOT_FINITE."""
        output, row = c_uint32(), c_uint32()
        self.engine.axc_not_finite(byref(output), byref(row))
        return output.value, row.value

    def failure(self, name: str, code: int) -> BadInput:
        """The error for the code that the function `name` has just returned in this thread."""
        why = f": {self.engine.axc_last_error().decode('utf-8', 'replace')}" if self.extended else ""
        return BadInput(f"{name} failed with 0x{code & 0xFFFFFFFF:08x}{why}"[:300])

    @property
    def isa(self) -> str:
        """The instruction set in use; empty for another engine."""
        return str(self.engine.axc_isa().decode()) if self.extended else ""

    def counters(self) -> dict[str, tuple[int, float]]:
        """Calls and seconds per kind of step since `reset_counters`; empty for another engine."""
        if not self.extended:
            return {}
        counters = (Counter * self.engine.axc_counters(None, 0))()
        self.engine.axc_counters(counters, len(counters))
        return {counter.kind.decode(): (counter.calls, counter.nanoseconds / 1e9) for counter in counters}

    def reset_counters(self) -> None:
        if self.extended:
            self.engine.axc_reset_counters()


def folder(ours: bool) -> str:
    """The folder of the engine for our axmodels or for the vendor's; empty: the dynamic linker's search path."""
    asked = os.environ.get(FOLDER)
    places = (asked,) if asked else (BESIDE, BOARD) if ours else (BOARD,)
    return next((str(place) for place in places if Path(place, "libax_engine.so").exists()), asked or "")


def is_there() -> bool:
    """Whether a known folder has an engine for our axmodels."""
    return bool(folder(ours=True))


def library(ours: bool = True) -> Library:
    """The engine for our axmodels or for the vendor's, loaded and initialised once.

    Raises BadInput if there is none, it fails to initialise, or this process already uses the other one: they share a
    name, so the dynamic linker would mix them up.
    """
    wanted = folder(ours)
    for loaded in _loaded:
        if loaded.folder != wanted:
            raise BadInput(
                f"this process runs libax_engine of {loaded.folder or 'the system'}; the axmodel is for that of "
                f"{wanted or 'the system'}\nRun our axmodels and the vendor's in separate processes."
            )
        return loaded
    _loaded.append(_load(wanted))
    return _loaded[0]


_loaded: list[Library] = []


def _load(folder: str) -> Library:
    where = f"{folder}/" if folder else ""
    try:
        system = ctypes.CDLL(f"{where}libax_sys.so", mode=ctypes.RTLD_GLOBAL)
        engine = ctypes.CDLL(f"{where}libax_engine.so")
    except OSError as error:
        raise EngineMissing(
            f"engine ax needs libax_engine.so: {error}\n"
            f"Build it with `make engine`, set {FOLDER} to its folder, or use --engine ort."
        ) from None
    extended = hasattr(engine, "axc_extensions") and engine.axc_extensions() == EXTENSIONS
    if extended:
        engine.axc_last_error.restype = engine.axc_isa.restype = c_char_p
    engine.AX_ENGINE_GetVersion.restype = c_char_p
    loaded = Library(system, engine, extended, folder)
    loaded.call("AX_SYS_Init")
    loaded.call("AX_ENGINE_Init", byref(NpuAttr()))
    atexit.register(engine.AX_ENGINE_Deinit)
    return loaded

"""Drivers and engines installed on this machine. Libraries are queried in a separate process."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from axrun.doctor import compatibility
from axrun.session import libax_engine

PROC = Path("/proc/ax_proc")  # Axera's driver
MOST = 4096  # maximum characters from a file or a library
SECONDS = 30.0  # timeout for querying a library

# Runs in a separate process: two libraries with the same name conflict, and a damaged one may crash.
ASK = """
import ctypes, json, os, sys
folder = sys.argv[1]
ctypes.CDLL(os.path.join(folder, "libax_sys.so"), mode=ctypes.RTLD_GLOBAL)
engine = ctypes.CDLL(os.path.join(folder, "libax_engine.so"))
engine.AX_ENGINE_GetVersion.restype = ctypes.c_char_p
print(json.dumps({
    "version": (engine.AX_ENGINE_GetVersion() or b"").decode("utf-8", "replace"),
    "affinity": hasattr(engine, "AX_ENGINE_SetAffinity"),
    "ops": hasattr(engine, "AX_ENGINE_GetTotalOps"),
    "extensions": engine.axc_extensions() if hasattr(engine, "axc_extensions") else 0,
}))
"""


@dataclass(frozen=True)
class Engine:
    """A libax_engine.so. `extensions` is 0 unless it is ours; `chip` is the family judging by its functions, or empty.

    `fault` is the reason why it does not load, or empty. `interpreter`: libax_interpreter.so, which it needs, exists.
    """

    folder: str
    version: str = ""
    chip: str = ""
    extensions: int = 0
    interpreter: bool = True
    fault: str = ""


@dataclass(frozen=True)
class Installed:
    """`bsp` and `chip_type` are reported by the driver, empty without one.

    `ours` and `vendors` are the engines that would run our axmodels and the vendor's, or None.
    """

    bsp: str
    chip_type: str
    ours: Engine | None
    vendors: Engine | None
    machine: str
    python: str
    libc: str

    @property
    def chip(self) -> str:
        """The family of the chip according to the driver, else the vendor's engine; empty if unknown."""
        return compatibility.family(self.chip_type) or (self.vendors.chip if self.vendors else "")


def look(proc: Path = PROC, soc: Path = libax_engine.BOARD) -> Installed:
    """Reads the driver's files and queries the libraries. `soc` is the folder of the vendor's libraries."""
    ours = libax_engine.folder(ours=True)
    vendors = os.environ.get(libax_engine.FOLDER) or os.fspath(soc)
    engines = {folder: ask(folder) for folder in {ours, vendors} if Path(folder, "libax_engine.so").exists()}
    return Installed(
        bsp=_line(proc / "version"),
        chip_type=_line(proc / "chip_type"),
        ours=engines.get(ours),
        vendors=engines.get(vendors),
        machine=platform.machine(),
        python=platform.python_version(),
        libc=" ".join(platform.libc_ver()).strip() or "an unknown C library",
    )


def ask(folder: str) -> Engine:
    """Queries the engine in a folder."""
    interpreter = Path(folder, "libax_interpreter.so").exists()
    command = [sys.executable, "-I", "-S", "-c", ASK, folder]
    try:
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Engine(folder, interpreter=interpreter, fault=f"no answer within {SECONDS:.0f} s")
    try:
        told = json.loads(done.stdout[:MOST])
        symbols = bool(told["affinity"]), bool(told["ops"])
        chip = compatibility.BY_SYMBOLS.get(symbols, "")
        return Engine(folder, printable(str(told["version"])), chip, int(told["extensions"]), interpreter)
    except (ValueError, KeyError, TypeError):
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        why = printable(said[-1]) if said else f"the process that loaded it exited with {done.returncode}"
        return Engine(folder, interpreter=interpreter, fault=why)


def printable(text: str) -> str:
    """Output of another program, shortened and without control characters."""
    return "".join(character for character in text if character.isprintable())[:200]


def _line(path: Path) -> str:
    try:
        with path.open("rb") as file:
            text = file.read(MOST).decode("utf-8", "replace")
    except OSError:
        return ""
    return printable(text.strip().partition("\n")[0])

"""A wheel of axrun carries libax_engine: `python -m build --wheel board`, for this machine. It has the page's Markdown
libraries where `make page` has brought them.

AXRUN_TARGET in the environment says for which: x86_64, aarch64, or pure for a wheel without the library, whose users
have another engine. AXRUN_LIBRARIES names a folder of libraries that are built already.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PURE = "pure"
ELF_MACHINES = {
    "x86_64": 62,
    "aarch64": 183,
}  # e_machine, https://refspecs.linuxfoundation.org/elf/gabi4+/ch4.eheader.html


def target() -> str:
    return os.environ.get("AXRUN_TARGET") or platform.machine()


class EngineHook(BuildHookInterface[Any]):
    """Puts the libraries into a wheel and tags it with their machine."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        return [] if target() == PURE or os.environ.get("AXRUN_LIBRARIES") else ["cmake", "ninja", "ziglang"]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        machine = target()
        if version == "editable":
            return
        if not Path(self.root, "axrun", "serve", "page", "lib").is_dir():
            self.app.display_warning("this wheel's page shows plain text: `make page` brings its Markdown libraries")
        if machine == PURE:
            return
        builder = engine_build(Path(self.root))
        if machine not in builder.MACHINES:
            raise SystemExit(
                f"error: axrun's engine is for {' or '.join(builder.MACHINES)}, not for {machine}\n"
                "AXRUN_TARGET=pure makes a wheel without it."
            )
        given = os.environ.get("AXRUN_LIBRARIES")
        try:
            engine = Path(self.root, "engine")
            # this machine's are where the checkout has its own, which may be there already
            into = engine / "lib" if machine == builder.HOST else engine / "build" / "wheel" / machine
            folder = Path(given) if given else builder.build(into, machine)
        except builder.NotBuilt as error:
            raise SystemExit(f"error: {error}") from None
        for name in builder.LIBRARIES:
            check(folder / name, machine)
            build_data["force_include"][str(folder / name)] = f"axrun/engine/lib/{name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-manylinux_{builder.GLIBC.replace('.', '_')}_{machine}"


def engine_build(root: Path) -> ModuleType:
    """engine/build.py: this folder is not a package while its wheel is being built."""
    spec = importlib.util.spec_from_file_location("engine_build", root / "engine" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(library: Path, machine: str) -> None:
    """Ends the build for a library that is not there, or another machine's."""
    head = library.read_bytes()[:20] if library.is_file() else b""
    seen = struct.unpack_from("<H", head, 18)[0] if head[:4] == b"\x7fELF" and len(head) == 20 else None
    if seen != ELF_MACHINES[machine]:
        raise SystemExit(f"error: {library} is {'not there' if not head else 'no library'} for {machine}")

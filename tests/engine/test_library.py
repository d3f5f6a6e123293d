"""The shared libraries: exported symbols, system requirements, reproducible builds."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from elftools.elf.elffile import ELFFile

from engine import build as shipped
from tests import vendor_files
from tests.engine.conftest import ROOT, SOURCE
from tests.engine.test_refusals import client

HEADERS = {
    "libax_sys.so": "ax_sys_api.h",
    "libax_engine.so": "ax_engine_api.h",
    "libax_interpreter.so": "ax_ivps_api.h",
}
EVERYWHERE = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2"}  # where glibc is
LOADER = {"x86_64": "ld-linux-x86-64.so.2", "aarch64": "ld-linux-aarch64.so.1"}
# Functions exported by the vendor's AX650 library; the AX630C's has five more.
AX630C_ONLY = {"GetTotalOps", "GetThrottle", "SetThrottle", "GetThrottleConfig", "DestroyKernelHandle"}


def section(elf: ELFFile, name: str) -> Any:
    found = elf.get_section_by_name(name)
    assert found is not None
    return found


def exported(library: Path) -> set[str]:
    with library.open("rb") as file:
        symbols = section(ELFFile(file), ".dynsym").iter_symbols()
        return {symbol.name for symbol in symbols if symbol["st_shndx"] != "SHN_UNDEF"}


def declared(header: str, ax630c: bool) -> set[str]:
    text = (SOURCE / "include" / header).read_text()
    if not ax630c:
        text = re.sub(r"#ifdef AXC_CHIP_AX630C.*?#endif", "", text, flags=re.S)
    return set(re.findall(r"\b(AX_(?:SYS|ENGINE)_[A-Z]\w+)\(", text))


@pytest.mark.parametrize("name", shipped.LIBRARIES)
def test_exactly_the_interface_is_exported(name: str, libraries: Path) -> None:
    symbols = exported(libraries / name)
    wanted = declared(HEADERS[Path(name).name], "ax630c" in name)
    assert {symbol for symbol in symbols if symbol.startswith("AX_")} == wanted
    assert all(symbol.startswith(("AX_", "axc_")) for symbol in symbols)


def test_exports_identify_the_chip(libraries: Path) -> None:
    ax650, ax630c = (exported(libraries / folder / "libax_engine.so") for folder in ("", "ax630c"))
    assert ax630c - ax650 == {f"AX_ENGINE_{name}" for name in AX630C_ONLY}
    assert len([name for name in ax650 if name.startswith("AX_ENGINE_")]) == 25
    assert "AX_ENGINE_SetAffinity" in ax650
    assert "AX_SYS_GetChipType" in exported(libraries / "ax630c/libax_sys.so")


AX630C = """
import ctypes, sys
system = ctypes.CDLL(sys.argv[1] + "/libax_sys.so", mode=ctypes.RTLD_GLOBAL)
engine = ctypes.CDLL(sys.argv[1] + "/libax_engine.so")
attr = (ctypes.c_int * 9)()
system.AX_SYS_Init()
def init(mode):
    attr[0] = mode
    return engine.AX_ENGINE_Init(ctypes.byref(attr)) & 0xFFFFFFFF
print(hex(init(1)), hex(init(2)), hex(init(4)), hex(engine.AX_ENGINE_CloneHandle() & 0xFFFFFFFF))
print(engine.AX_ENGINE_GetTotalOps(), system.AX_SYS_GetChipType()) if hasattr(engine, "AX_ENGINE_GetTotalOps") else None
"""


@pytest.mark.parametrize(
    ("folder", "said"),
    [("", ["0x0 0x0 0x8006000a 0x80060014"]), ("ax630c", ["0x0 0x8006000a 0x8006000a 0x80060014", "0 4"])],
)
def test_each_chip_has_its_modes(folder: str, said: list[str], libraries: Path) -> None:
    done = subprocess.run([sys.executable, "-c", AX630C, libraries / folder], capture_output=True, text=True)
    assert (done.stdout.splitlines(), done.stderr) == (said, "")


def test_an_ax630c_has_two_model_types(libraries: Path, tmp_path: Path) -> None:
    files = [vendor_files.write(tmp_path, vendor_files.ROWS["AX620E"], npu) for npu in (0, 1, 2)]
    out, said = client(libraries / "ax630c", [["AX_ENGINE_GetModelType", file, "kind"] for file in files])
    assert out == ["0 0", "0 1", "8006000a 1"]
    (line,) = said
    assert "model type 2; an AX630C has 2" in line


def requirements(library: Path) -> Iterator[tuple[str, str]]:
    """The symbol versions that a library needs, with the library that has them."""
    with library.open("rb") as file:
        for needed, versions in section(ELFFile(file), ".gnu.version_r").iter_versions():
            for version in versions:
                yield needed.name, version.name


def check_system(folder: Path, machine: str) -> None:
    """Raises AssertionError if the libraries in `folder` need more than an old glibc."""
    for name in shipped.LIBRARIES:
        with (folder / name).open("rb") as file:
            elf = ELFFile(file)
            assert elf.get_machine_arch() == {"x86_64": "x64", "aarch64": "AArch64"}[machine]
            tags = list(section(elf, ".dynamic").iter_tags())
        assert [tag.soname for tag in tags if tag.entry.d_tag == "DT_SONAME"] == [Path(name).name]
        needed = {tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"}
        ours = {"libax_sys.so"} if "engine" in name else set()
        assert needed - EVERYWHERE - {LOADER[machine]} == ours
        versions = set(requirements(folder / name)) if "interpreter" not in name else set()
        assert versions or "interpreter" in name
        for library, version in versions:
            assert tuple(map(int, version.removeprefix("GLIBC_").split("."))) <= (2, 31), (name, library, version)


def test_an_old_glibc_and_no_cxx_runtime_are_enough(libraries: Path) -> None:
    check_system(libraries, shipped.HOST)


def test_an_unchanged_library_is_not_rebuilt(libraries: Path, tmp_path: Path) -> None:
    said: list[str] = []
    assert shipped.build(say=said.append) == libraries
    assert said == []


def test_changed_sources_are_rebuilt(tmp_path: Path) -> None:
    copy = tmp_path / "board" / "engine"
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("lib", "build", "fuzz", "__pycache__"))
    (copy.parent / "axrun").mkdir()
    shutil.copy(SOURCE.parent / "axrun" / "__init__.py", copy.parent / "axrun")
    assert shipped.fingerprint(copy) == shipped.fingerprint()
    for file in ("src/onnx.cc", "src/kernels/avx2.cc", "include/axc_engine.h", "exports.map", "CMakeLists.txt"):
        before = shipped.fingerprint(copy)
        with (copy / file).open("a") as opened:
            opened.write("\n")
        assert shipped.fingerprint(copy) != before


def test_an_unsupported_machine_is_reported(tmp_path: Path) -> None:
    with pytest.raises(shipped.NotBuilt, match="for Linux on x86_64 or aarch64, not on riscv64"):
        shipped.build(tmp_path, "riscv64")


def test_compile_errors_are_reported(tmp_path: Path) -> None:
    engine = tmp_path / "board" / "engine"
    shutil.copytree(SOURCE, engine, ignore=shutil.ignore_patterns("lib", "build", "fuzz", "__pycache__"))
    (engine.parent / "axrun").mkdir()
    shutil.copy(SOURCE.parent / "axrun" / "__init__.py", engine.parent / "axrun")
    (engine / "src" / "abi_sys.cc").write_text("int nonsense = ;\n")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "cache").symlink_to(SOURCE / "build" / "cache")
    with pytest.raises(shipped.NotBuilt, match=r"does not build.* says\n.*abi_sys.cc:1:16: error: expected expression"):
        shipped.build(tmp_path / "lib", engine=engine, work=tmp_path / "work", say=lambda line: None)
    assert not (tmp_path / "lib").exists()


@pytest.mark.system  # slow: a minute
def test_the_same_bytes_from_another_folder(libraries: Path, tmp_path: Path) -> None:
    engine = tmp_path / "elsewhere" / "engine"
    shutil.copytree(SOURCE, engine, ignore=shutil.ignore_patterns("lib", "build", "fuzz", "__pycache__"))
    (engine.parent / "axrun").mkdir()
    shutil.copy(SOURCE.parent / "axrun" / "__init__.py", engine.parent / "axrun")
    # The cache avoids building libc++ again. Our objects are cached by source path, so they are built again here.
    # tests/container/test_image.py compares with libraries built without a cache.
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "cache").symlink_to(SOURCE / "build" / "cache")
    other = shipped.build(tmp_path / "lib", engine=engine, work=tmp_path / "work", say=lambda line: None)
    for name in shipped.LIBRARIES:
        data = (libraries / name).read_bytes()
        assert data == (other / name).read_bytes()
        assert str(ROOT).encode() not in data


def test_the_headers_are_plain_c(tmp_path: Path) -> None:
    """The headers compile as C."""
    source = tmp_path / "client.c"
    source.write_text("#include <ax_sys_api.h>\n#include <axc_engine.h>\nint main(void) { return AX_SYS_Init(); }\n")
    command = [shipped.program("ziglang", "zig"), "cc", "-std=c99", "-Wall", "-Wextra", "-Werror"]
    env = shipped.environment(SOURCE / "build" / "cache")
    command += [f"-I{SOURCE / 'include'}", "-c", str(source), "-o", "client.o"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "client.o").exists()


@pytest.mark.parametrize("chip", ["", "-DAXC_CHIP_AX630C"])
@pytest.mark.parametrize("language", [["cc", "-std=c11", "-xc"], ["c++", "-std=c++20", "-xc++"]])
def test_structures_and_constants_match_the_documentation(language: list[str], chip: str, tmp_path: Path) -> None:
    """layout.c asserts them at compile time."""
    source = Path(__file__).parent / "layout.c"
    command = [shipped.program("ziglang", "zig"), *language, "-target", f"{shipped.HOST}-linux-gnu.{shipped.GLIBC}"]
    command += ["-O3", "-Wall", "-Wextra", "-Werror", *([chip] if chip else [])]
    command += [f"-I{SOURCE / 'include'}", "-c", str(source), "-o", "layout.o"]
    env = shipped.environment(SOURCE / "build" / "cache")
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_python_finds_the_structures_sizes(libraries: Path) -> None:
    """The ctypes structures have the sizes that the library's sources assert."""
    from axrun.session import libax_engine

    sizes = {"IoBuffer": 128, "Io": 128, "IoMeta": 128, "IoInfo": 128, "NpuAttr": 36}
    assert {name: ctypes.sizeof(getattr(libax_engine, name)) for name in sizes} == sizes

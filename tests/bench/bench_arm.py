"""Integer products on the boards' cores, Cortex-A55 and Cortex-A53, beside llama.cpp's: cycles estimated by llvm-mca.

`make bench ARGS='-k arm'`. No board is needed: tests/bench/core_cycles.py says what the estimate leaves out. Ours
is the whole product of 8 rows: packing, scales and loops included, rounding of the activations not. llama.cpp's are the
functions that its matrix product calls for 8 rows, from the source that requirements/llama.cpp-source.txt pins: the dot
product of a row with a token, and on cores with the 8-bit dot product those of repacked weights.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from engine import build as shipped
from tests.bench.core_cycles import MCA, OBJDUMP, QEMU, cycles
from tests.bench.tables import record
from tests.engine.conftest import ROOT, SOURCE

CACHE = ROOT / "build" / "bench-arm"
DRIVERS = Path(__file__).parent / "arm"
ROWS = 8
COLUMNS = {1: 1024, 64: 512}  # by number of tokens
CORES = {  # our kernels, their file and its flags in board/engine/CMakeLists.txt, the flags that llama.cpp gets
    "cortex-a55": ("kNeonDotprod", "neon_dotprod.cc", ["-mcpu=cortex_a55-fullfp16-rcpc"], "-mcpu=cortex_a55"),
    "cortex-a53": ("kNeon", "neon.cc", ["-mcpu=cortex_a53-aes-sha2-crc"], "-mcpu=cortex_a53"),
}
REPACKED = ("cortex-a55",)
CASES = {  # our type, columns that share a scale, bits of a weight, llama.cpp's type
    "s8": ("s8", 0, 8, "q8_0"),
    "s8 in 64": ("b8", 64, 8, "q8_0"),
    "s4 in 128": ("s4", 128, 4, "q4_0"),
    "s4 in 64": ("s4", 64, 4, "q4_0"),
    "s4 in 32": ("s4", 32, 4, "q4_0"),
}
NOTE = """An estimate by a static model, LLVM's of the core, not a measurement: cycles that a multiply-add (a weight
with an activation) takes, in the order of the executed instructions. It leaves out cache misses, memory bandwidth,
wrong branch predictions, and that a core loads 128 bits slower than 64. ax multiplies activations of 16 bits, ax-int8
and llama.cpp of 8. llama.cpp repacked: Q8_0 and Q4_0 as llama.cpp stores them for cores with dot products. The ratios
are of cycles, ax to llama.cpp's: less is better."""


def compiled(made: Path, core: str, source: Path, flags: list[str]) -> Path:
    """An object file for a core, by the engine's compiler."""
    zig, target = shipped.program("ziglang", "zig"), f"aarch64-linux-gnu.{shipped.GLIBC}"
    language = ["cc", "-std=c11"] if source.suffix == ".c" else ["c++", "-std=c++20"]
    command = [zig, language[0], "-c", "-target", target, language[1], "-O3", "-DNDEBUG", "-ffunction-sections"]
    run([*command, "-fno-stack-protector", "-w", *flags, str(source), "-o", str(made / f"{core}-{source.name}.o")])
    return made / f"{core}-{source.name}.o"


def linked(program: Path, objects: list[Path]) -> Path:
    """A program that runs without a C library; what it does not call may be missing."""
    linker = [shipped.program("ziglang", "zig"), "ld.lld", "--gc-sections", "--unresolved-symbols=ignore-all"]
    run([*linker, "-o", str(program), *map(str, objects)])
    return program


def run(command: list[str]) -> None:
    env = shipped.environment(SOURCE / "build" / "cache")
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def ours(folder: Path, core: str) -> Path:
    table, file, flags, _ = CORES[core]
    kernels, same = SOURCE / "src" / "kernels", ["-ffp-contract=off", f"-I{SOURCE / 'include'}"]
    driver = compiled(folder, core, DRIVERS / "ours.cc", [*same, f"-I{kernels}", f"-DKERNELS={table}"])
    return linked(folder / f"ours-{core}", [driver, compiled(folder, core, kernels / file, [*flags, *same])])


def llamas(folder: Path, core: str, ggml: Path) -> Path:
    flags = [CORES[core][3], *(f"-I{ggml / path}" for path in ("include", "src", "src/ggml-cpu"))]
    repacked = core in REPACKED
    driver = compiled(folder, core, DRIVERS / "llama.cc", ["-DREPACKED"] if repacked else [])
    files = ["quants.c", *(["repack.cpp"] if repacked else [])]
    objects = [compiled(folder, core, ggml / "src" / "ggml-cpu" / "arch" / "arm" / file, flags) for file in files]
    return linked(folder / f"llama-{core}", [driver, *objects])


@pytest.fixture(scope="session")
def ggml() -> Path:
    """The folder ggml of llama.cpp's source, fetched once."""
    lock = ROOT / "requirements" / "llama.cpp-source.txt"
    place = CACHE / lock.read_text().split("==")[1].split()[0]
    if not (place / "complete").exists():
        place.mkdir(parents=True, exist_ok=True)
        if not list(place.glob("*.tar.gz")):
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary=:all:", "--require-hashes"]
            run([*pip, "-r", str(lock), "-d", str(place)])
        (source,) = place.glob("*.tar.gz")
        with tarfile.open(source) as archive:
            wanted = [member for member in archive.getmembers() if "/vendor/llama.cpp/ggml/" in member.name]
            archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Debian 12's Python has no filters
            archive.extractall(place, wanted)
        source.unlink()
        (place / "complete").touch()
    (found,) = place.glob("*/vendor/llama.cpp/ggml")
    return found


@pytest.mark.skipif(
    None in map(shutil.which, (MCA, OBJDUMP, QEMU)), reason="needs llvm-19 and qemu-user-static of Debian or Ubuntu"
)
def test_arm_cores(ggml: Path, benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    rows = benchmark.pedantic(lambda: [row for core in CORES for row in measured(core, ggml, tmp_path)], rounds=1)
    columns = [
        "core, weights, tokens",
        "ax",
        "ax bytes/cycle",
        "ax-int8",
        "llama.cpp",
        "ratio",
        "repacked",
        "ratio to it",
    ]
    title = "Boards' cores: estimated cycles a multiply-add"
    record(benchmark, "arm-cores", title, columns, rows, unit="cycles", note=NOTE)


def measured(core: str, ggml: Path, folder: Path) -> list[list[str]]:
    """The rows of a core."""
    program, peer = ours(folder, core), llamas(folder, core, ggml)

    def each(of: Path, before: list[str], columns: int, tokens: int, *after: str) -> float:
        """Cycles of a multiply-add."""
        found = cycles(of, core, [*before, str(columns), str(tokens), *after], folder)
        return found / (ROWS * columns * tokens)

    rows = []
    for name, (kind, group, bits, peers) in CASES.items():
        for tokens, columns in COLUMNS.items():
            some = min(tokens, 4)  # llama.cpp's functions take one token or four, however many there are
            ax, int8 = (each(program, [kind, str(group)], columns, tokens, precision) for precision in ("16", "8"))
            dot = each(peer, [peers, "dot"], columns, some)
            numbers = [ax, bits / 8 / (ax * tokens), int8, dot, ax / dot]
            if core in REPACKED:
                repacked = each(peer, [peers, "repacked"], columns, some)
                numbers += [repacked, ax / repacked]
            cells = [f"{value:.3f}" for value in numbers]
            rows.append([f"{core.replace('cortex-a', 'A')}, {name}, {tokens}", *cells, *([""] * (7 - len(cells)))])
    return rows

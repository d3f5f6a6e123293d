"""The engine for aarch64 under qemu-user, emulating a board's CPU: onnxruntime's values, this machine's bytes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from axrun.format.bundle import Bundle
from axrun.format.dtypes import to_float32
from axrun.session import ort
from engine import build as shipped
from tests.engine.compare import exact, filled
from tests.engine.conftest import CACHE, compile_client
from tests.engine.rounded import ENGINES, rounded
from tests.engine.test_library import check_system
from tests.engine.test_numerics import grouped, levels, linear_file

pytestmark = pytest.mark.system

QEMU, GLIBC = "qemu-aarch64-static", "/usr/aarch64-linux-gnu"  # qemu-user-static, libc6-arm64-cross
CPUS = {"cortex-a53": "neon", "cortex-a76": "neon_dotprod"}
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
TOKENS = (1, 41, 7, 8, 9, 10)  # one in place; the others in tiles, with every rest of 4 or 6 rows


@pytest.fixture(scope="session")
def boards_libraries() -> Path:
    return shipped.build(CACHE / "aarch64", "aarch64")


@pytest.fixture(scope="session")
def program(boards_libraries: Path) -> Path:
    return compile_client("run_group.cc", boards_libraries, boards_libraries / "run_group", "aarch64")


def test_an_old_glibc_and_no_cxx_runtime_are_enough(boards_libraries: Path) -> None:
    check_system(boards_libraries, "aarch64")


def test_the_vendor_runners_calls_on_a_boards_cpu(boards_libraries: Path, bundle_s8: Path) -> None:
    client = compile_client("runner.cc", boards_libraries, boards_libraries / "runner", "aarch64")
    layer = Bundle.open(bundle_s8).layer_path(0)
    command = [QEMU, "-cpu", "cortex-a53", "-L", GLIBC, str(client), str(layer), "20"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "done"


@pytest.mark.parametrize("isa", ["", "portable"])
@pytest.mark.parametrize("cpu", CPUS)
def test_a_boards_cpu_matches_onnxruntime_and_this_machine(
    cpu: str, isa: str, program: Path, build_tiny: Callable[..., Path], tmp_path: Path, ax: Any
) -> None:
    for hidden, weight in (("bf16", "s8"), ("fp32", "s4"), ("fp32", "bf16")):
        path = Bundle.open(build_tiny(hidden_state_type=hidden, weight_type=weight)).layer_path(1)
        plain, ours = exact(path), ax.open_session(path)
        for group in plain.groups[:3]:
            arrays = filled(plain, group.index)
            plain.bind(group.index, arrays).run()
            inputs = b"".join(arrays[info.name].tobytes() for info in group.inputs)
            here = {name: array.copy() for name, array in arrays.items()}
            if not group.history:  # skip two placeholders of the hidden state's width
                inputs = bytes(2 * arrays["input"].shape[2] * arrays["input"].itemsize) + inputs
            out = run(program, path, group.index, inputs, tmp_path, cpu, isa)
            check(plain, group.index, arrays, out, TOLERANCE[hidden])
            ours.bind(group.index, here).run()
            assert out == b"".join(here[info.name].tobytes() for info in group.outputs), "others than on this machine"


@pytest.mark.parametrize("cpu", CPUS)
def test_a_boards_cpu_rounds_activations_to_the_requested_bits(cpu: str, program: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    shapes = ((37, 384, 128), (33, 576, 32), (9, 576, 64), (3, 96, 96), (7, 36, 0))
    paths = [linear_file(tmp_path, levels(random, "INT8", 37, 300, 0), {"axis": 0})]
    for scale_dtype, zeros in (("FLOAT", False), ("FLOAT16", True)):
        paths += grouped(tmp_path, scale_dtype, zeros, shapes, TOKENS if zeros else TOKENS[:2])
    for path in paths:
        plain = exact(path)
        for group in (group for group in plain.groups if group.tokens in TOKENS):
            arrays = filled(plain, group.index)
            inputs, given = arrays["input"].tobytes(), arrays["input"].copy()
            for bits, (engine, top) in ENGINES.items():
                arrays["input"][...] = rounded(given, top)
                plain.bind(group.index, arrays).run()
                out = run(program, path, group.index, inputs, tmp_path, cpu, bits=bits)
                check(plain, group.index, arrays, out, 1e-5)
                arrays["input"][...] = given
                engine.open_session(path).bind(group.index, arrays).run()
                assert out == b"".join(arrays[info.name].tobytes() for info in group.outputs), (path, bits)


def run(
    program: Path, model: Path, group: int, inputs: bytes, folder: Path, cpu: str, isa: str = "", bits: int = 16
) -> bytes:
    """The concatenated outputs of a group, computed by the engine on an emulated CPU."""
    (folder / "in").write_bytes(inputs)
    emulated = [QEMU, "-cpu", cpu, "-L", GLIBC, "-E", f"AXC_ISA={isa}", "-E", "AXC_THREADS=2"]
    command = [*emulated, program, model, str(group), folder / "in", folder / "out", str(bits)]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == (isa or CPUS[cpu])
    return (folder / "out").read_bytes()


def check(plain: ort.OrtSession, group: int, arrays: dict[str, Any], out: bytes, tolerance: float) -> None:
    at = 0
    for info in plain.groups[group].outputs:
        wanted = arrays[info.name]
        seen = np.frombuffer(out, wanted.dtype, wanted.size, at).reshape(wanted.shape)
        at += wanted.nbytes
        a, b = to_float32(seen, info.dtype), to_float32(wanted, info.dtype)
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), (group, info.name)
    assert at == len(out)

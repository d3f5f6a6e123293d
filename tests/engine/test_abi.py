"""The C interface as used by its clients: the vendor's C++ runner, its Python binding, and axrun's session."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from axrun.errors import BadInput
from axrun.format import axmodel
from axrun.format.bundle import Bundle
from axrun.format.dtypes import bf16_to_f32
from axrun.session import ax_int8
from tests.engine.compare import filled
from tests.engine.conftest import ROOT, SOURCE, compile_client

SEED = SOURCE / "fuzz" / "corpus" / "qwen2-bf16-s8-layer"  # the smallest layer there is


@pytest.mark.parametrize(("layer", "cycles"), [("tiny-qwen2", 100), ("seed", 10_000)])
def test_the_calls_of_the_vendors_runner(layer: str, cycles: int, runner: Path, bundle_s8: Path) -> None:
    """Buffers with odd sizes, NULL caches, RunSync with a V2 context only, unloading and loading again."""
    path = SEED if layer == "seed" else Bundle.open(bundle_s8).layer_path(0)
    done = subprocess.run([runner, path, str(cycles)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "done"
    settled, after = (int(figure) for figure in re.findall(r"(\d+) kB", done.stdout))
    held_back = 65536 if "ASAN_OPTIONS" in os.environ else 0  # a sanitizer frees late
    assert 0 < after <= settled + 512 + held_back


def test_the_calls_of_the_vendors_context_runner(libraries: Path, ax: Any, bundle_s8: Path, tmp_path: Path) -> None:
    """It compares names by pointer, to find the K/V buffers of the decode group for the prefill groups."""
    client = compile_client("context_runner.cc", libraries, tmp_path / "context_runner")
    path = Bundle.open(bundle_s8).layer_path(0)
    done = subprocess.run([client, path, tmp_path / "group2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "done\n"
    session, content, at = ax.open_session(path), (tmp_path / "group2").read_bytes(), 0
    group = session.groups[2]
    arrays = {info.name: session.allocate(info) for info in group.inputs + group.outputs}
    for info in group.inputs:
        array = arrays[info.name]
        array[...] = np.frombuffer(content, array.dtype, array.size, at).reshape(array.shape)
        at += array.nbytes
    assert arrays["K_cache"].any()
    session.bind(2, arrays).run()
    assert arrays["output"].tobytes() == content[at:]


class Meta(ctypes.Structure):
    _fields_ = (
        ("pName", ctypes.c_char_p),
        ("pShape", ctypes.POINTER(ctypes.c_int32)),
        ("nShapeSize", ctypes.c_uint8),
        ("eLayout", ctypes.c_int),
        ("eMemoryType", ctypes.c_int),
        ("eDataType", ctypes.c_int),
        ("pExtraMeta", ctypes.c_void_p),
        ("nSize", ctypes.c_uint32),
        ("nQuantizationValue", ctypes.c_uint32),
        ("pStride", ctypes.c_void_p),
        ("u64Reserved", ctypes.c_uint64 * 9),
    )


class Info(ctypes.Structure):
    _fields_ = (
        ("pInputs", ctypes.POINTER(Meta)),
        ("nInputSize", ctypes.c_uint32),
        ("pOutputs", ctypes.POINTER(Meta)),
        ("nOutputSize", ctypes.c_uint32),
        ("nMaxBatchSize", ctypes.c_uint32),
        ("bDynamicBatchSize", ctypes.c_int),
        ("u64Reserved", ctypes.c_uint64 * 11),
    )


class Buffer(ctypes.Structure):
    _fields_ = (
        ("phyAddr", ctypes.c_uint64),
        ("pVirAddr", ctypes.c_void_p),
        ("nSize", ctypes.c_uint32),
        ("pStride", ctypes.c_void_p),
        ("nStrideSize", ctypes.c_uint8),
        ("u64Reserved", ctypes.c_uint64 * 11),
    )


class ShortIo(ctypes.Structure):
    """The binding's IO_T has 120 bytes, 8 less than in the headers."""

    _fields_ = (
        ("pInputs", ctypes.POINTER(Buffer)),
        ("nInputSize", ctypes.c_uint32),
        ("pOutputs", ctypes.POINTER(Buffer)),
        ("nOutputSize", ctypes.c_uint32),
        ("nBatchSize", ctypes.c_uint32),
        ("pIoSetting", ctypes.c_void_p),
        ("u64Reserved", ctypes.c_uint64 * 10),
    )


class Extra(ctypes.Structure):
    _fields_ = (("nNpuSet", ctypes.c_uint32), ("pName", ctypes.c_char_p), ("reserve", ctypes.c_uint32 * 8))


def test_the_calls_of_the_vendors_python_binding(libraries: Path, ax: Any, bundle_s8: Path) -> None:
    """One buffer per tensor, of the largest size of all groups; CreateHandleV2, RunGroupIOSync with a 120-byte IO_T."""
    assert ctypes.sizeof(ShortIo) == 120
    ax.library()  # initialises
    engine, system = ctypes.CDLL(str(libraries / "libax_engine.so")), ctypes.CDLL(str(libraries / "libax_sys.so"))
    path = Bundle.open(bundle_s8).layer_path(1)
    data = path.read_bytes()
    kind, handle, context, count = ctypes.c_uint32(9), ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_uint32()
    assert engine.AX_ENGINE_GetModelType(data, ctypes.c_uint32(len(data)), ctypes.byref(kind)) == 0
    assert kind.value == 0
    extra = Extra(pName=b"tiny")
    assert (
        engine.AX_ENGINE_CreateHandleV2(ctypes.byref(handle), data, ctypes.c_uint32(len(data)), ctypes.byref(extra))
        == 0
    )
    assert engine.AX_ENGINE_CreateContextV2(handle, ctypes.byref(context)) == 0
    assert engine.AX_ENGINE_GetGroupIOInfoCount(handle, ctypes.byref(count)) == 0
    infos: list[Info] = []
    for group in range(count.value):
        pointer = ctypes.POINTER(Info)()
        assert engine.AX_ENGINE_GetGroupIOInfo(handle, group, ctypes.byref(pointer)) == 0
        infos.append(pointer.contents)
    assert all(infos[0].pInputs[i].pName == infos[1].pInputs[i].pName for i in range(infos[0].nInputSize))

    def buffers(direction: str, number: int) -> Any:
        made = (Buffer * number)()
        for i, buffer in enumerate(made):
            buffer.nSize = max(getattr(info, direction)[i].nSize for info in infos)
            physical, address = ctypes.c_uint64(), ctypes.c_void_p()
            arguments = ctypes.c_uint32(buffer.nSize), ctypes.c_uint32(128), b"PyEngine"
            assert system.AX_SYS_MemAllocCached(ctypes.byref(physical), ctypes.byref(address), *arguments) == 0
            buffer.phyAddr, buffer.pVirAddr = physical.value, address.value
        return made

    inputs, outputs = buffers("pInputs", infos[0].nInputSize), buffers("pOutputs", infos[0].nOutputSize)
    session = ax.open_session(path)
    for group, info in enumerate(infos):
        arrays = filled(session, group)
        session.bind(group, arrays).run()
        for i in range(info.nInputSize):
            array = arrays.get(info.pInputs[i].pName.decode())
            if array is not None:
                assert array.nbytes == info.pInputs[i].nSize
                ctypes.memmove(inputs[i].pVirAddr, array.ctypes.data, array.nbytes)
            arguments = ctypes.c_uint64(inputs[i].phyAddr), ctypes.c_void_p(inputs[i].pVirAddr)
            assert system.AX_SYS_MflushCache(*arguments, ctypes.c_uint32(inputs[i].nSize)) == 0
        io = ShortIo(pInputs=inputs, nInputSize=len(inputs), pOutputs=outputs, nOutputSize=len(outputs))
        assert engine.AX_ENGINE_RunGroupIOSync(handle, context, ctypes.c_uint32(group), ctypes.byref(io)) == 0
        for i in range(info.nOutputSize):
            wanted = arrays[info.pOutputs[i].pName.decode()]
            seen = np.frombuffer(ctypes.string_at(outputs[i].pVirAddr, wanted.nbytes), np.uint16)
            np.testing.assert_array_equal(seen, wanted.ravel())
    engine.AX_ENGINE_GetModelToolsVersion.restype = ctypes.c_char_p
    assert engine.AX_ENGINE_GetModelToolsVersion(handle).startswith(b"axc ")
    assert engine.AX_ENGINE_DestroyHandle(handle) == 0


def test_without_the_extensions_the_session_uses_the_plain_interface(ax: Any, bundle_s8: Path) -> None:
    """As the vendor's library needs it: fixed shapes, models passed as bytes, physical buffers with synchronisation."""
    bundle = Bundle.open(bundle_s8)
    extended = ax.library()
    plain = ax.Library(extended.sys, extended.engine, False)
    for path in (bundle.layer_path(0), bundle.post_path):
        one, other = ax.open_session(path), ax.open_with(plain, path, axmodel.read(path))
        assert not other.flexible
        assert [(group.tokens, group.history) for group in other.groups] == [(g.tokens, g.history) for g in one.groups]
        for group in one.groups:
            expected, seen = filled(one, group.index), filled(other, group.index)
            one.bind(group.index, expected).run()
            other.bind(group.index, seen).run()
            for info in group.outputs:
                np.testing.assert_array_equal(seen[info.name], expected[info.name])


def test_8_bit_activations_need_an_engine_that_supports_them(
    ax: Any, bundle_s8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ax.Library(ax.library().sys, ax.library().engine, False)
    monkeypatch.setattr(ax, "library", lambda ours=True: plain)
    with pytest.raises(BadInput, match="does not run on our own libax_engine"):
        ax_int8.open_session(Bundle.open(bundle_s8).post_path)


def test_fewer_tokens_than_the_group_give_the_same_values(ax: Any, bundle_s8: Path) -> None:
    session = ax.open_session(Bundle.open(bundle_s8).layer_path(2))
    assert session.flexible
    arrays = filled(session, 0)
    arrays["mask"][0, 0, 40:255] = np.uint16(0xC780)  # -65536
    session.bind(0, arrays).run()
    whole = bf16_to_f32(arrays["output"])
    short = {name: array[:, :40] if name in ("K_cache", "V_cache") else array for name, array in arrays.items()}
    short["mask"] = np.concatenate([arrays["mask"][..., :40], arrays["mask"][..., 255:]], axis=-1)
    session.bind(0, short).run()
    np.testing.assert_allclose(bf16_to_f32(arrays["output"]), whole, rtol=0, atol=2e-2 * np.abs(whole).max())


def test_masked_rows_are_not_read(ax: Any, bundle_fp32: Path) -> None:
    session = ax.open_session(Bundle.open(bundle_fp32).layer_path(0))
    arrays = filled(session, 0)
    arrays["mask"][0, 0, 32:255] = -65536
    session.bind(0, arrays).run()
    clean = arrays["output"].copy()
    arrays["K_cache"][0, 64:] = np.nan
    arrays["V_cache"][0, 64:] = np.nan
    session.bind(0, arrays).run()
    np.testing.assert_array_equal(arrays["output"], clean)


def test_arrays_that_do_not_fit_are_refused(ax: Any, bundle_s8: Path) -> None:
    session = ax.open_session(Bundle.open(bundle_s8).layer_path(0))
    arrays = filled(session, 0)
    with pytest.raises(ValueError, match=r"K_cache is uint16\[1, 255, 32\], expected BFLOAT16\[1, 255, 64\]"):
        session.bind(0, {**arrays, "K_cache": arrays["K_cache"][:, :, ::2]})
    with pytest.raises(ValueError, match="nonsense"):
        session.bind(0, {**arrays, "nonsense": arrays["input"]})
    del arrays["input"]
    with pytest.raises(ValueError, match="cannot be bound"):
        session.bind(0, arrays)


def test_a_position_outside_the_tables_is_an_error(ax: Any, bundle_s8: Path) -> None:
    session = ax.open_session(Bundle.open(bundle_s8).layer_path(0))
    arrays = filled(session, 0)
    arrays["indices"][0] = 1 << 31
    with pytest.raises(BadInput, match="position 2147483648 is outside the"):
        session.bind(0, arrays).run()


def test_memory_goes_back_when_the_last_view_is_gone(ax: Any) -> None:
    from axrun.format.axmodel import TensorInfo

    array = ax.allocate(TensorInfo("input", "FLOAT", (1, 3, 5)))
    before, view = len(ax._blocks), array[0, 1:]
    assert ax._physical(view) == ax._physical(array) + 20
    del array
    assert len(ax._blocks) == before
    del view
    assert len(ax._blocks) == before - 1


def test_time_counters(ax: Any, bundle_s8: Path) -> None:
    session = ax.open_session(Bundle.open(bundle_s8).layer_path(0))
    binding = session.bind(0, filled(session, 0))
    ax.library().reset_counters()
    binding.run()
    counters = ax.library().counters()
    # steps: q, k and v; o; gate, up and their product; down
    assert {kind: calls for kind, (calls, _) in counters.items() if calls} == {
        "linear": 4,
        "attention": 1,
        "rotary": 2,
        "norm": 2,
        "cast": 3,
    }
    assert counters["linear"][1] > 0


VENDORS = """
import sys
from pathlib import Path
from axrun.errors import BadInput
from axrun.session import ax_engine, libax_engine
libax_engine.BOARD = Path(sys.argv[1])
for path in sys.argv[2:]:
    try:
        ax_engine.open_session(path)
        print(libax_engine._loaded[0].folder)
    except BadInput as error:
        print(str(error).replace("\\n", " "))
"""


def test_the_producer_of_an_axmodel_selects_the_library(
    libraries: Path, bundle_s8: Path, vendors_axmodel: Path, tmp_path: Path
) -> None:
    """Here the vendor's library is a copy of ours, which does not drive an NPU: the vendor's axmodel is refused."""
    board, ours = shutil.copytree(libraries, tmp_path / "soc"), Bundle.open(bundle_s8).layer_path(0)
    said = []
    environment = {name: value for name, value in os.environ.items() if name != "AXRUN_ENGINE"}
    for files in ([ours, vendors_axmodel], [vendors_axmodel, ours]):
        command = [sys.executable, "-c", VENDORS, str(board), *map(str, files)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        said.append(done.stdout.splitlines())
    beside = ROOT / "board" / "engine" / "lib"
    assert said[0][0] == str(beside)
    assert said[0][1].startswith(f"this process runs libax_engine of {beside}; the axmodel is for that of {board} ")
    assert re.search(
        r"vendor.axmodel is made by Pulsar2: it is code for an NPU, and needs a board with one", said[1][0]
    )
    assert said[1][1].startswith(f"this process runs libax_engine of {board}; the axmodel is for that of {beside} ")


MAPPED = """
import re, sys
from pathlib import Path
from axrun.session import open_session
from tests.engine.compare import filled
path = sys.argv[1]
session = open_session(path)
session.bind(0, filled(session, 0)).run()
print("ready", flush=True)
sys.stdin.readline()
maps = re.split(r"\\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
for entry in maps:
    if path in entry:
        sizes = dict(re.findall(r"^(\\w+): +(\\d+) kB", entry, re.M))
        print(sizes["Rss"], sizes["Pss"], sizes["Anonymous"])
"""


def test_processes_share_the_pages_of_a_file(libraries: Path, bundle_s8: Path) -> None:
    path = str(Bundle.open(bundle_s8).layer_path(3))
    command = [sys.executable, "-c", MAPPED, path]
    processes = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes[:1]:
        out, _ = process.communicate("\n")
        resident, proportional, copied = map(int, out.split())
        assert resident > 100
        assert proportional <= 0.6 * resident
        assert copied == 0  # Private_Dirty would count pages of the file that are not yet on disk
    processes[1].communicate("\n")

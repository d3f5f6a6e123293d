"""Errors of the vendor's interface: return codes for wrong calls, and one line on stderr for a refused model."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from axrun.format.bundle import Bundle
from tests import vendor_files
from tests.engine.conftest import ROOT

# Calls functions of a library in a separate process and prints their codes. Arguments: the folder and the calls.
CLIENT = """
import ctypes, json, sys
folder, calls = sys.argv[1], json.loads(sys.argv[2])
system = ctypes.CDLL(folder + "/libax_sys.so", mode=ctypes.RTLD_GLOBAL)
engine = ctypes.CDLL(folder + "/libax_engine.so")
system.AX_SYS_Mmap.restype = ctypes.c_void_p
attr, kind = (ctypes.c_int * 9)(), ctypes.c_int(9)
handle, physical, address = ctypes.c_void_p(), ctypes.c_uint64(), ctypes.c_void_p()
places = {"attr": ctypes.byref(attr), "kind": ctypes.byref(kind), "handle": ctypes.byref(handle), "null": None,
          "physical": ctypes.byref(physical), "address": ctypes.byref(address)}
values = {"HANDLE": lambda: handle, "PHYSICAL": lambda: ctypes.c_uint64(physical.value), "ADDRESS": lambda: address,
          "ELSEWHERE": lambda: ctypes.c_uint64(1 << 40), "NOBODY": lambda: ctypes.c_void_p(64)}
for name, *arguments in calls:
    given = []
    for argument in arguments:
        if isinstance(argument, str) and argument.startswith("/"):
            data = open(argument, "rb").read()
            given += [data, ctypes.c_uint32(len(data))]
        elif argument in values:
            given.append(values[argument]())
        else:
            given.append(places[argument] if isinstance(argument, str) else ctypes.c_uint32(argument))
    result = getattr(system if name.startswith("AX_SYS") else engine, name)(*given)
    print("%x" % ((result or 0) & 0xFFFFFFFF), kind.value)
"""

INIT: list[list[Any]] = [["AX_SYS_Init"], ["AX_ENGINE_Init", "attr"]]
OK = "0"


def client(folder: Path, calls: list[list[Any]], **environment: str) -> tuple[list[str], list[str]]:
    """The code of each call with the model type after it, and the lines on stderr."""
    calls = [[str(part) if isinstance(part, Path) else part for part in call] for call in calls]
    kept = {name: value for name, value in os.environ.items() if name != "AXC_QUIET"}
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, str(folder), json.dumps(calls)],
        env={**kept, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr.splitlines()


def codes(folder: Path, calls: list[list[Any]], **environment: str) -> list[str]:
    return [line.split()[0] for line in client(folder, calls, **environment)[0]]


def test_calls_in_the_wrong_order_are_refused(libraries: Path, bundle_s8: Path) -> None:
    model = Bundle.open(bundle_s8).post_path
    memory = ["AX_SYS_MemAllocCached", "physical", "address", 64, 128, "null"]
    sequence: list[tuple[list[Any], str]] = [
        (["AX_SYS_Deinit"], "800b0010"),
        (memory, "800b0010"),
        (["AX_SYS_MflushCache", "PHYSICAL", "ADDRESS", 64], "800b0010"),
        (["AX_SYS_MinvalidateCache", "PHYSICAL", "ADDRESS", 64], "800b0010"),
        (["AX_ENGINE_Init", "attr"], "80060010"),
        (["AX_ENGINE_Deinit"], "80060012"),
        (["AX_ENGINE_GetVNPUAttr", "attr"], "80060012"),
        (["AX_ENGINE_CreateHandle", "handle", model], "80060012"),
        (["AX_SYS_Init"], OK),
        (["AX_ENGINE_Init", "null"], "8006000b"),
        (["AX_ENGINE_Init", "attr"], OK),
        (["AX_ENGINE_Init", "attr"], OK),  # a second library of the same process
        (["AX_ENGINE_GetVNPUAttr", "null"], "8006000b"),
        (["AX_ENGINE_GetVNPUAttr", "attr"], OK),
        (memory, OK),
        (["AX_SYS_MemAlloc", "null", "address", 64, 128, "null"], "800b000b"),
        (["AX_SYS_MemAlloc", "physical", "null", 64, 128, "null"], "800b000b"),
        (["AX_SYS_MemAlloc", "physical", "address", 0, 128, "null"], "800b000a"),
        (["AX_SYS_MemAlloc", "physical", "address", 64, 100, "null"], "800b000a"),
        (["AX_SYS_MflushCache", "PHYSICAL", "ADDRESS", 64], OK),
        (["AX_SYS_MflushCache", "PHYSICAL", "ADDRESS", 65], "800b000a"),
        (["AX_SYS_MinvalidateCache", "ELSEWHERE", "null", 1], "800b000a"),
        (["AX_SYS_Munmap", "NOBODY", 64], "800b0081"),
        (["AX_SYS_MemFree", "ELSEWHERE", "null"], "800b0082"),
        (["AX_SYS_MemFree", "PHYSICAL", "ADDRESS"], OK),
        (["AX_SYS_MemFree", "PHYSICAL", "ADDRESS"], "800b0082"),
        (["AX_ENGINE_CreateHandle", "null", model], "8006000b"),
        (["AX_ENGINE_CreateHandle", "handle", "null", 4], "8006000b"),
        (["AX_ENGINE_GetModelType", model, "null"], "8006000b"),
        (["AX_ENGINE_GetModelType", "null", 4, "kind"], "8006000b"),
        (["AX_ENGINE_GetIOInfo", "NOBODY", "address"], "80060017"),
        (["AX_ENGINE_GetGroupIOInfoCount", "NOBODY", "kind"], "80060017"),
        (["AX_ENGINE_GetHandleModelType", "NOBODY", "kind"], "80060017"),
        (["AX_ENGINE_GetCMMUsage", "NOBODY", "kind"], "80060017"),
        (["AX_ENGINE_CreateContext", "NOBODY"], "80060017"),
        (["AX_ENGINE_DestroyHandle", "null"], "80060017"),
        (["AX_ENGINE_CreateHandle", "handle", model], OK),
        (["AX_ENGINE_GetIOInfo", "HANDLE", "null"], "8006000b"),
        (["AX_ENGINE_GetGroupIOInfoCount", "HANDLE", "null"], "8006000b"),
        (["AX_ENGINE_CreateContextV2", "HANDLE", "null"], "8006000b"),
        (["AX_ENGINE_GetHandleModelType", "HANDLE", "null"], "8006000b"),
        (["AX_ENGINE_GetHandleModelType", "HANDLE", "kind"], OK),
        (["AX_ENGINE_GetAffinity", "HANDLE", "null"], "8006000b"),
        (["AX_ENGINE_GetCMMUsage", "HANDLE", "null"], "8006000b"),
        (["AX_ENGINE_RunSync", "HANDLE", "null"], "8006000b"),
        (["AX_ENGINE_DestroyHandle", "HANDLE"], OK),
        (["AX_ENGINE_Deinit"], OK),
        (["AX_ENGINE_GetVNPUAttr", "attr"], "80060012"),
        (["AX_SYS_Deinit"], OK),
        (["AX_SYS_Deinit"], "800b0010"),
    ]
    seen = codes(libraries, [call for call, _ in sequence])
    assert [(call, code) for (call, _), code in zip(sequence, seen, strict=True)] == sequence


def test_reported_memory_of_a_model(libraries: Path, bundle_s8: Path) -> None:
    model = Bundle.open(bundle_s8).post_path
    out, _ = client(
        libraries, [*INIT, ["AX_ENGINE_CreateHandle", "handle", model], ["AX_ENGINE_GetCMMUsage", "HANDLE", "kind"]]
    )
    assert out[-1] == f"0 {model.stat().st_size}"


class Extra(ctypes.Structure):
    _fields_ = (("nNpuSet", ctypes.c_uint32), ("pName", ctypes.c_char_p), ("reserve", ctypes.c_uint32 * 8))


def test_a_handle_has_the_requested_cores(ax: Any, bundle_s8: Path) -> None:
    engine, data = ax.library().engine, Bundle.open(bundle_s8).post_path.read_bytes()
    handle, cores = ctypes.c_void_p(), ctypes.c_uint32()
    arguments = ctypes.byref(handle), data, ctypes.c_uint32(len(data)), ctypes.byref(Extra(nNpuSet=0b101))
    assert engine.AX_ENGINE_CreateHandleV2(*arguments) == 0
    assert engine.AX_ENGINE_GetAffinity(handle, ctypes.byref(cores)) == 0
    assert cores.value == 0b101
    assert engine.AX_ENGINE_DestroyHandle(handle) == 0


@pytest.mark.parametrize("name", vendor_files.ROWS)
def test_the_model_type_of_a_vendors_axmodel_is_its_npu_mode(name: str, libraries: Path, tmp_path: Path) -> None:
    row = vendor_files.ROWS[name]
    files = [vendor_files.write(tmp_path, row, npu) for npu in (0, 1, 2)]
    calls = [["AX_ENGINE_GetModelType", file, "kind"] for file in files]
    assert client(libraries, calls) == (["0 0", "0 1", "0 2"], [])


GARBAGE = {
    "noise": (bytes(range(1, 250)) * 9, "8006000a", "field number 0"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\nsize 1\n", "8006000a", "a Git LFS pointer of 50 bytes"),
    "encrypted": (b"\xde\xad\xbe\xef" * 9, "80060014", "an encrypted model"),
    "no base64": (vendor_files.encode(vendor_files.ROWS["4.1"], "?" * 8), "8006000a", "is not base64"),
    "another length": (vendor_files.encode(vendor_files.ROWS["4.1"], "QUJ"), "8006000a", "is not base64"),
    "no message": (vendor_files.encode(vendor_files.ROWS["4.1"], "/////w=="), "8006000a", "where 0 are left"),
    "silent": (vendor_files.encode(vendor_files.ROWS["4.1"], ""), "8006000a", "without metadata extra_data"),
    "cut": (vendor_files.encode(vendor_files.ROWS["4.1"], "")[:-9], "8006000a", "are left"),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_has_no_model_type(name: str, libraries: Path, tmp_path: Path) -> None:
    content, code, words = GARBAGE[name]
    path = tmp_path / "garbage.axmodel"
    path.write_bytes(content)
    out, said = client(libraries, [["AX_ENGINE_GetModelType", path, "kind"]])
    assert out == [f"{code} 9"]
    (line,) = said
    assert words in line


def edited(good: bytes, old: bytes, new: bytes) -> bytes:
    assert old in good
    return good.replace(old, new)


def test_a_refused_model_is_reported_once_in_one_line(libraries: Path, bundle_s8: Path, tmp_path: Path) -> None:
    good = Bundle.open(bundle_s8).layer_path(0).read_bytes()
    cases = {
        "vendor": (
            vendor_files.write(tmp_path, vendor_files.ROWS["4.1"]).read_bytes(),
            "an axmodel of Pulsar2 4.1-patch1, not of axc: code for an NPU, which only the board's own libax_engine",
        ),
        "cut": (good[: len(good) // 2], "are left"),
        "version": (
            edited(good, b"axmodel.version\x12\x011", b"axmodel.version\x12\x012"),
            "axmodel version 2, expected 1",
        ),
        "operator": (edited(good, b"Sigmoid", b"Sig\x1b[2m"), "operator Sig?[2m"),
        "empty": (b"", "an empty file"),
    }
    for name, (content, words) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        calls: list[list[Any]] = [
            ["AX_ENGINE_CreateHandleV2", "handle", path, "null"],
            ["AX_ENGINE_CreateHandle", "handle", path],
        ]
        out, said = client(libraries, INIT + calls)
        assert out[2] == out[3] != "0 9"
        (line,) = said  # a retry of the same client prints nothing
        assert line.startswith("libax_engine (axc ")
        assert words in line
        assert "expected an axmodel made by axc" in line
        assert line.isprintable()
        assert len(line) < 500
        assert client(libraries, INIT + calls, AXC_QUIET="1")[1] == []
        assert client(libraries, INIT + calls, AXC_QUIET="0")[1] == said


def test_a_wrong_call_prints_nothing(libraries: Path, bundle_s8: Path) -> None:
    model = Bundle.open(bundle_s8).post_path
    calls: list[list[Any]] = [
        ["AX_ENGINE_CreateHandle", "handle", model],
        *INIT,
        ["AX_ENGINE_CreateHandle", "null", model],
    ]
    assert client(libraries, calls)[1] == []


def test_axruns_session_reports_it_once(libraries: Path, bundle_s8: Path, tmp_path: Path) -> None:
    path = tmp_path / "odd.axmodel"
    path.write_bytes(edited(Bundle.open(bundle_s8).layer_path(0).read_bytes(), b"Sigmoid", b"Sigmojd"))
    command = [sys.executable, "-m", "axrun", "model", str(path), "--engine", "ax"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("operator Sigmojd") == 1
    assert "libax_engine (axc" not in done.stderr

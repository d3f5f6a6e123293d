"""Free memory as reported by the NPU driver and the kernel, and the check before a bundle is loaded."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from axrun.errors import BadInput
from axrun.format.bundle import Bundle
from axrun.free_memory import MEMINFO, available
from axrun.memory import cmm_left, needs, refuse, remaining, require, shortage
from axrun.model import Model
from tests.axrun.tty import Tty
from tests.doctor import axmodels

ROOT = Path(__file__).parents[2]
CMM = """--------------------SDK VERSION-------------------
[Axera version]: ax_cmm V2.0.0
+---PARTITION: Phys(0x80000000, 0xFFFFFFFF), Size=2097152KB(2048MB),    NAME="anonymous"
---CMM_USE_INFO:
 total size=2097152KB(2048MB),used=100352KB(98MB + 0KB),remain=1996800KB(1950MB + 0KB),partition_number=1
"""


@pytest.fixture
def none(tmp_path: Path) -> Path:
    return tmp_path / "none"


@pytest.fixture
def vendors(bundle_s8: Path, tmp_path: Path) -> Bundle:
    """A bundle whose manifest says that the vendor's compiler made it."""
    folder = Path(shutil.copytree(bundle_s8, tmp_path / "vendors"))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "maker": "pulsar2"}))
    return Bundle.open(folder)


def meminfo(folder: Path, kilobytes: int) -> Path:
    path = folder / "meminfo"
    path.write_text(f"MemTotal:       99999999 kB\nMemFree:          123456 kB\nMemAvailable:   {kilobytes} kB\n")
    return path


def cmm(folder: Path, kilobytes: int) -> Path:
    path = folder / "mem_cmm_info"
    path.write_text(CMM.replace("remain=1996800KB(1950MB", f"remain={kilobytes}KB({kilobytes // 1024}MB"))
    return path


def test_cmm_has_precedence(tmp_path: Path) -> None:
    info = tmp_path / "mem_cmm_info"
    info.write_text(CMM)
    assert remaining(cmm_info=info) == "remain_cmm(1950 MB)"
    assert cmm_left(info) == 1996800 << 10


def test_without_cmm_it_is_the_available_memory(none: Path) -> None:
    seen = re.fullmatch(r"remain_mem\((\d+) MB\)", remaining(cmm_info=none))
    assert seen
    total = re.search(r"MemTotal:\s+(\d+) kB", MEMINFO.read_text())
    assert total
    assert 0 < int(seen[1]) <= int(total[1]) // 1024


def test_unknown_memory_is_not_reported_or_refused(tmp_path: Path, none: Path, bundle_s8: Path) -> None:
    (tmp_path / "odd").write_text("total size=?")
    assert remaining(tmp_path / "odd", none) == ""
    assert available(none) is None
    require(Bundle.open(bundle_s8), "ort", refuse, none, none)


def test_kv_cache_and_file_sizes_are_counted_exactly(bundle_s8: Path, model_s8: Model) -> None:
    bundle = Bundle.open(bundle_s8)
    mapped = needs(bundle, "ax")
    assert mapped.kv_cache == model_s8.decoder.cache.nbytes
    assert mapped.weights == sum(path.stat().st_size for path in bundle_s8.glob("*.axmodel"))
    assert needs(bundle, "ort").weights > mapped.weights
    assert mapped.total == mapped.weights + mapped.kv_cache + mapped.buffers
    limited = [needs(bundle, engine, 4, limit).kv_cache for engine, limit in (("ax", 9), ("ax", 1 << 40), ("ort", 9))]
    assert limited == [9, 4 * mapped.kv_cache, 4 * mapped.kv_cache]


def test_the_estimate_matches_a_process(bundle_s8: Path, engine: str) -> None:
    """Most of it is the interpreter, for such a small model."""
    script = (
        "import tokenizers, jinja2\nfrom axrun.format.bundle import Bundle\n"
        "from axrun.machine import peak_memory\nfrom axrun.model import Model\n"
        f"model = Model.load(Bundle.open({str(bundle_s8)!r}), {engine!r})\nmodel.forward(list(range(255)))\n"
        "print(peak_memory())"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.7 < needs(Bundle.open(bundle_s8), engine).total / int(done.stdout) < 1.5


@pytest.mark.parametrize("spare", [-1, 0])
def test_one_kilobyte_too_little_is_refused_with_the_numbers(
    bundle_s8: Path, tmp_path: Path, none: Path, spare: int
) -> None:
    bundle = Bundle.open(bundle_s8)
    needed = needs(bundle, "ort")
    left = meminfo(tmp_path, -(-needed.total >> 10) + spare)
    if spare == 0:
        assert shortage(bundle, "ort", none, left) is None
        require(bundle, "ort", refuse, none, left)
        return
    with pytest.raises(BadInput) as caught:
        require(bundle, "ort", refuse, none, left)
    text = str(caught.value)
    assert text.startswith(f"the bundle needs {needed.total >> 20} MB of memory (weights {needed.weights >> 20}, ")
    assert "--force" in text
    assert text.count("\n") == 1


def test_a_vendor_bundle_needs_cmm(vendors: Bundle, tmp_path: Path, none: Path) -> None:
    plenty, little = meminfo(tmp_path, 1 << 30), cmm(tmp_path, 1000)
    with pytest.raises(BadInput, match=r"MB of CMM .*0 MB are free"):
        require(vendors, "ax", refuse, little, plenty)
    with pytest.raises(BadInput, match="MB of memory"):
        require(vendors, "ax", refuse, none, meminfo(tmp_path, 1000))
    require(vendors, "ax", refuse, cmm(tmp_path, 1 << 21), meminfo(tmp_path, 1000))


def test_our_axmodels_need_host_memory(bundle_s8: Path, tmp_path: Path) -> None:
    require(Bundle.open(bundle_s8), "ort", refuse, cmm(tmp_path, 1000), meminfo(tmp_path, 1 << 30))


def test_the_allow_callback_decides(bundle_s8: Path, tmp_path: Path, none: Path) -> None:
    asked: list[str] = []

    def allow(text: str) -> bool:
        asked.append(text)
        return True

    require(Bundle.open(bundle_s8), "ort", allow, none, meminfo(tmp_path, 1000))
    assert len(asked) == 1
    assert "0 MB are free" in asked[0]


@pytest.fixture
def immense(bundle_s8: Path, tmp_path: Path) -> Path:
    """A bundle with a sparse post model file of a thousand gigabytes."""
    folder = Path(shutil.copytree(bundle_s8, tmp_path / "immense"))
    name, size = "qwen2_post.axmodel", 10**12
    os.truncate(folder / name, size)
    axmodels.manifest(folder, lambda values: values["files"][name].update(size=size))
    return folder


@pytest.mark.parametrize("verb", [["run", "--prompt", "1+1="], ["chat"], ["bench"]])
def test_every_command_checks_before_loading(immense: Path, verb: list[str]) -> None:
    command = [sys.executable, "-m", "axrun", verb[0], str(immense), *verb[1:]]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "axmodel ok" not in done.stderr
    assert re.search(r"error: the bundle needs \d{6,} MB of memory .* MB are free\n.*--force", done.stderr)
    forced = subprocess.run(
        [*command, "--force"], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert "warning: the bundle needs" in forced.stderr
    assert "init 3 axmodel ok" in forced.stderr  # it went on up to that file
    assert forced.returncode == 2


@pytest.mark.parametrize(("answer", "loaded"), [("y", True), ("n", False), ("", False)])
def test_a_terminal_user_is_asked(immense: Path, answer: str, loaded: bool) -> None:
    tty = Tty(["run", immense, "--prompt", "1+1="], {})
    try:
        tty.expect(r"MB are free\r\nLoad it anyway\? \[y/N\] ")
        tty.type(answer + "\r")
        assert tty.end() == 2
        assert (b"init 0 axmodel ok" in tty.seen) == loaded
    finally:
        tty.close()

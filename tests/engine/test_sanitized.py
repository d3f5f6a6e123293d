"""The engine with clang's AddressSanitizer and UndefinedBehaviorSanitizer, and its loader under libFuzzer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.conftest import ROOT, SOURCE, build

pytestmark = pytest.mark.system

CLANG = "-DCMAKE_CXX_COMPILER=clang++"
FUZZED_SECONDS = 60
# Excluded: tests of the library files, which differ in a sanitized build, and tests that start other tests.
APART = ("test_library.py", "test_wheel.py", "test_sanitized.py", "test_aarch64.py")


def sanitized() -> Path:
    """The folder of the libraries and of the fuzzer, which share the kernels: those take minutes to compile."""
    targets = ("ax_sys", "ax_engine", "ax_interpreter", "fuzz_load")
    return build("sanitized", "-DAXC_SANITIZE=ON", "-DAXC_STATIC_RUNTIME=OFF", CLANG, targets=targets)


def test_the_engine_tests_pass_with_sanitizers() -> None:
    folder = sanitized()
    name = f"libclang_rt.asan-{os.uname().machine}.so"
    found = subprocess.run(["clang++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    environment = {
        **os.environ,
        "AXRUN_ENGINE": str(folder),
        "LD_PRELOAD": found.stdout.strip(),
        # Python itself leaks memory
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:quarantine_size_mb=16",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    ignored = [f"--ignore=tests/engine/{name}" for name in APART]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/engine",
        *ignored,
        "-m",
        "not system",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout.splitlines()[-1]


def test_the_loader_is_fuzzed_for_a_minute(tmp_path: Path) -> None:
    folder = sanitized()
    corpus = shutil.copytree(SOURCE / "fuzz" / "corpus", tmp_path / "corpus")
    limits = [f"-max_total_time={FUZZED_SECONDS}", "-max_len=20000", "-rss_limit_mb=3000", "-timeout=300"]
    done = subprocess.run(
        [folder / "fuzz_load", corpus, *limits, f"-artifact_prefix={tmp_path}/"],
        env={**os.environ, "AXC_THREADS": "1"},
        capture_output=True,
        text=True,
        errors="replace",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "DONE" in done.stderr

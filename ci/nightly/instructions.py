"""python -m ci.nightly.instructions BUNDLE OUT: counts the instructions of a fixed prompt and answer with callgrind.

Processor time on an emulated board depends on the load of the host. Instruction counts depend only on the code, so a
change of a few per cent is visible. They are counted on this machine: the engine's x86-64 build with its AVX2 kernels
(valgrind does not support AVX-512), and the runner under this Python.
https://valgrind.org/docs/manual/cl-manual.html
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from axrun.errors import BadInput, CheckFailed, Failure
from ci.nightly import metrics

ROOT = Path(__file__).resolve().parents[2]
COUNTED = Path(__file__).with_name("counted.py")
BEGIN, END = "getpgid", "getsid"
SECONDS = 900
PYTHON = "{}{}".format(*sys.version_info[:2])
ENGINE, RUNNER = "engine_instructions", f"runner_instructions_{PYTHON}"
ENVIRONMENT = {"AXC_ISA": "avx2", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}


def unavailable() -> str:
    """Why instructions cannot be counted on this machine; empty if they can."""
    if platform.machine() != "x86_64":
        return f"instructions are counted on x86-64, this is {platform.machine()}"
    return "" if shutil.which("valgrind") else "instructions are counted by valgrind: apt-get install valgrind"


def not_applicable(name: str) -> str:
    """Why a gate of this name does not apply on this machine; empty if it does."""
    if not name.startswith(metrics.COUNTED):
        return ""
    return unavailable() or ("" if name in (ENGINE, RUNNER) else f"this is Python {PYTHON[0]}.{PYTHON[1:]}")


def count(bundle: Path, root: Path = ROOT / "board") -> dict[str, float]:
    """Millions of instructions of the engine, and of everything else: the least of a few runs.

    `root` is the folder of the package `axrun`. Raises BadInput if this machine cannot count, CheckFailed if the run
    fails.
    """
    if reason := unavailable():
        raise BadInput(reason)
    with tempfile.TemporaryDirectory() as folder:
        out, package, linked = (Path(folder) / name for name in ("out", "root", "bundle"))
        # Links give paths of one length wherever the checkout is: string lengths and alignment cost instructions.
        package.symlink_to(root.resolve())
        linked.symlink_to(bundle.resolve())
        callgrind = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", "--dump-instr=no"]
        marks = [f"--zero-before={BEGIN}", f"--dump-before={END}"]
        try:
            done = subprocess.run(
                [*callgrind, *marks, sys.executable, str(COUNTED), str(linked)],
                cwd=folder,
                env={"PATH": os.defpath, **ENVIRONMENT, "PYTHONPATH": str(package)},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise CheckFailed(f"counting instructions did not finish within {SECONDS} s") from None
        dumps = sorted(out.parent.glob("out.*"))
        if done.returncode or not dumps:
            said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("==")]
            last = (said or ["it printed nothing"])[-1][:300]
            raise CheckFailed(f"counting instructions ended with {done.returncode}: {last}")
        costs = [_costs(dump.read_text("utf-8", "replace")) for dump in dumps]
    return {ENGINE: min(costs)[1] / 1e6, RUNNER: min(total - engine for total, engine in costs) / 1e6}


def _costs(profile: str) -> tuple[int, int]:
    """The total instructions of a callgrind profile, and those inside libax_engine.

    Format: https://valgrind.org/docs/manual/cl-format.html. `ob=(id) path` names the object of the following lines. A
    line of numbers is a position and its self cost; the line after `calls=` is the cost of a call, counted elsewhere.
    """
    names: dict[str, str] = {}
    total = engine = 0
    inside = called = False
    for line in profile.splitlines():
        if found := re.match(r"ob=\((\d+)\)(?: (.*))?$", line):
            names.setdefault(found[1], found[2] or "")
            inside = "libax_engine" in names[found[1]]
        elif found := re.match(r"cob=\((\d+)\) (.*)$", line):
            names.setdefault(found[1], found[2])
        elif line.startswith("calls="):
            called = True
        elif re.match(r"(?:[+-]?\d+|\*) \d+$", line):
            cost = int(line.rpartition(" ")[2])
            if not called:
                total += cost
                engine += cost if inside else 0
            called = False
    if not engine:
        raise CheckFailed("callgrind counted no instructions in libax_engine: was the library renamed?")
    return total, engine


def main(argv: Sequence[str]) -> int:
    bundle, out = map(Path, argv)
    try:
        found = count(bundle)
    except Failure as failure:
        print(f"error: {failure}")
        return failure.exit_code
    out.write_text(json.dumps(found) + "\n", "utf-8")
    print("\n".join(f"{metrics.find(name).label}: {metrics.find(name).text(value)}" for name, value in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

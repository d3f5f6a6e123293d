"""Instruction counts of a fixed answer repeat, and a slowdown of 5 % is red."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from axrun.errors import BadInput, CheckFailed
from ci.nightly import gate, instructions, metrics
from ci.nightly.instructions import ENGINE, RUNNER, count

ROOT = Path(__file__).resolve().parents[2]
PROFILE = """version: 1
creator: callgrind-3.19.0
positions: line
events: Ir
ob=(1) /usr/bin/python3
fl=(1) x.c
fn=(1) main
0 100
+3 7
cob=(2) /lib/libax_engine.so
cfi=(2) y.cc
cfn=(2) axc_run
calls=4 0
* 1000
ob=(2)
fl=(2)
fn=(2)
0 900
+1 60
cob=(3) /lib/libc.so.6
cfn=(3) memcpy
calls=1 0
-2 40
ob=(3)
fn=(3)
0 40
ob=(2)
fn=(4) axc_other
* 1
"""
# Every 24th run of the engine happens twice; each step of the decoder loops for nothing.
SLOW_ENGINE = """

_runs, _run = [0], AxBinding.run
def _slow(self):
    _runs[0] += 1
    for _ in range(2 if _runs[0] % 24 == 0 else 1):
        _run(self)
AxBinding.run = _slow
"""
SLOW_RUNNER = """

_step = Decoder._step
def _slow(self, chunk):
    for _ in range(120):
        pass
    return _step(self, chunk)
Decoder._step = _slow
"""


def test_a_profile_is_summed_by_object() -> None:
    assert instructions._costs(PROFILE) == (100 + 7 + 900 + 60 + 40 + 1, 900 + 60 + 1)
    with pytest.raises(CheckFailed, match="callgrind counted no instructions in libax_engine"):
        instructions._costs(PROFILE.replace("libax_engine", "libother"))


def test_a_machine_that_cannot_count_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert instructions.unavailable() == "instructions are counted by valgrind: apt-get install valgrind"
    with pytest.raises(BadInput, match="apt-get install valgrind"):
        count(tmp_path)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert instructions.unavailable() == "instructions are counted on x86-64, this is aarch64"


@pytest.mark.system
def test_a_slowdown_of_5_percent_is_red(bundle_s8: Path, tmp_path: Path) -> None:
    """Of the engine and of the runner, by gates as they are recorded."""
    healthy = count(bundle_s8)
    gates = {
        name: gate.Gate(value, metrics.find(name).floor * value, "M", "measured", "a test")
        for name, value in healthy.items()
    }
    assert count(bundle_s8) == pytest.approx(healthy, rel=2e-3)
    for name, file, plant in ((ENGINE, "session/ax_engine.py", SLOW_ENGINE), (RUNNER, "decoder.py", SLOW_RUNNER)):
        copy = tmp_path / name
        shutil.copytree(ROOT / "board", copy, ignore=shutil.ignore_patterns("build", "__pycache__"))
        with (copy / "axrun" / file).open("a") as stream:
            stream.write(plant)
        slower = count(bundle_s8, copy)
        assert 1.02 < slower[name] / healthy[name] < 1.075
        (judged,) = (entry for entry in gate.judge(slower, gates) if entry.metric.name == name)
        print(judged.reason())
        assert judged.outcome == "worse"

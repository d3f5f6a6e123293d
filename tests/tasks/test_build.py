"""The README's first commands, from checkpoint to answer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from axc.inventory import inventory

ROOT = Path(__file__).resolve().parents[2]


def invoke(*words: str, **said: str) -> subprocess.CompletedProcess[str]:
    environment = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    return subprocess.run(
        [sys.executable, "-m", "invoke", *words],
        cwd=ROOT,
        env={**environment, "PYTHONUNBUFFERED": "1", **said},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("with a space") / "out"


def test_build_makes_checks_lists_and_asks(out: Path) -> None:
    done = invoke("build", "--out", str(out), "--parallel", "2")
    assert done.returncode == 0, done.stderr
    bundle = out / "tiny-qwen2"
    lines = done.stdout.splitlines()
    assert f"contents of {bundle}:" in lines
    assert inventory(bundle) in done.stdout
    assert "2" in lines[lines.index(f"contents of {bundle}:") :]
    assert lines[-1] == f"to run another prompt: make run OUT='{out}' PROMPT='12+30='"

    asked = invoke("run", "--out", str(out), "--prompt", "12+30=")
    assert asked.returncode == 0, asked.stderr
    assert "42" in asked.stdout.splitlines()


def test_a_build_without_torch_says_that_it_is_unchecked(tmp_path: Path) -> None:
    done = invoke("build", "--out", str(tmp_path), "--engine", "local", TORCH="none")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "2" in lines[lines.index(f"contents of {tmp_path / 'tiny-qwen2'}:") :]
    assert next(line for line in lines if line.startswith("check ")) == "check 0: load and run"
    assert not [line for line in lines if line.startswith(("check 1", "check 2"))]
    at = lines.index("not checked against the float32 reference: TORCH=none leaves torch out")
    assert (
        lines[at + 1]
        == f"to check it: make build OUT={tmp_path} TORCH=pypi (3 GB to download), or WHEELS=folder with that wheel"
    )


def test_an_unknown_source_of_torch_lists_the_known_ones(tmp_path: Path) -> None:
    done = invoke("build", "--out", str(tmp_path / "out"), "--engine", "local", TORCH="gpu")
    assert done.returncode == 2
    assert done.stderr == "error: TORCH is 'gpu'; expected cpu, pypi or none\n"
    assert not (tmp_path / "out").exists()


def test_inventory_counts_layers_and_folders_as_one(tmp_path: Path) -> None:
    for name, size in {"q_l0.axmodel": 1000, "q_l11.axmodel": 1_500_000, "hf/a.json": 10, "hf/b.json": 20}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    assert inventory(tmp_path).splitlines() == [
        "    2 x    0.0 kB  hf/",
        "    2 x    1.5 MB  q_l*.axmodel",
        "    4 x    1.5 MB  in all",
    ]

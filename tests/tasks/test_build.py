"""The README's first commands, from checkpoint to answer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from axc.inventory import inventory
from axc.models import find_model
from ci.tasks.common import another_prompt
from tests.axc.hub_server import REPO, REVISION, serving

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


def test_build_compiles_checks_lists_and_runs(out: Path) -> None:
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


def test_a_hub_repository_builds_and_answers_without_torch(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with serving() as hub:
        hub.publish({path.name: path.read_bytes() for path in (ROOT / "models/tiny-qwen2").iterdir() if path.is_file()})
        cache = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
        done = invoke("build", "--model", REPO, "--out", out, "--engine", "local", TORCH="none", **cache)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert f"{REPO} was not pinned. Its main is now pinned at commit {REVISION}:" in lines
    assert "2" in lines[lines.index(f"contents of {out}/owner--toy:") :]
    assert next(line for line in lines if line.startswith("check ")) == "check 0: load and run"
    assert not [line for line in lines if line.startswith(("check 1", "check 2"))]
    at = lines.index("not checked against the float32 reference: TORCH=none leaves torch out")
    where = f"MODEL={REPO} OUT={out}"
    assert (
        lines[at + 1]
        == f"to check it: make build {where} TORCH=pypi (3 GB to download), or WHEELS=folder with that wheel"
    )
    assert lines[-1] == f"to run another prompt: make run {where} PROMPT='12+30='"
    asked = invoke("run", "--model", REPO, "--out", out, "--prompt", "12+30=")
    assert asked.returncode == 0, asked.stderr
    assert "42" in asked.stdout.splitlines()


@pytest.mark.parametrize(
    ("model", "prompt"), [("tiny-qwen2", "12+30="), (REPO, "12+30="), ("smollm2-135m", "Why is the sky blue?")]
)
def test_the_suggested_prompt_suits_the_model(model: str, prompt: str) -> None:
    assert another_prompt(find_model(model)) == prompt


def test_an_unknown_source_of_torch_lists_the_known_ones(tmp_path: Path) -> None:
    done = invoke("build", "--out", str(tmp_path / "out"), "--engine", "local", TORCH="gpu")
    assert done.returncode == 2
    assert done.stderr == "error: TORCH is 'gpu'; expected cpu, pypi or none\n"
    assert not (tmp_path / "out").exists()


def test_inventory_groups_layers_and_folders(tmp_path: Path) -> None:
    for name, size in {"q_l0.axmodel": 1000, "q_l11.axmodel": 1_500_000, "hf/a.json": 10, "hf/b.json": 20}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    assert inventory(tmp_path).splitlines() == [
        "    2 x    0.0 kB  hf/",
        "    2 x    1.5 MB  q_l*.axmodel",
        "    4 x    1.5 MB  in all",
    ]

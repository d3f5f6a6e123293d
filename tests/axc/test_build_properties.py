"""The same inputs and flags give the same bytes on any machine, in any folder and environment, with any parallelism."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from axc import build
from tests.axc.axc import assert_done, assert_same_files, environment, llm_build

FLAGS = ("--prefill_len", 32, "--kv_cache_len", 255, "--last_kv_cache_len", 64, "--post_topk", 4)


@pytest.fixture(scope="module", params=["pristine", "uneven"])
def model(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(request.param))


@pytest.fixture(scope="module", params=["s8", "s4"])
def weight_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def expected(model: Path, weight_type: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle built by one process."""
    output = tmp_path_factory.mktemp("expected") / "bundle"
    assert_done(llm_build(model, output, *FLAGS, "-w", weight_type, "--quantizer", "rtn"))
    return output


def test_parallel_and_in_another_folder(model: Path, weight_type: str, expected: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "link").symlink_to(model)
    relative = os.path.relpath(model, here)
    for number, (path, parallel) in enumerate([(relative, 1), ("link", 2), (relative + "/./", 3)]):
        output = f"../out/{number}/other-name"
        assert_done(
            llm_build(
                Path(path), output, *FLAGS, "-w", weight_type, "--quantizer", "rtn", "--parallel", parallel, cwd=here
            )
        )
        assert_same_files(here / output, expected)


def simd() -> list[str]:
    """numpy's CPU features beyond its baseline, named as in NPY_DISABLE_CPU_FEATURES."""
    report = "import numpy; print(*numpy.show_config(mode='dicts')['SIMD Extensions'].get('found', []))"
    return subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True).stdout.split()


def test_on_an_older_processor(model: Path, weight_type: str, expected: Path, tmp_path: Path) -> None:
    """numpy without runtime-selected instructions, and OpenBLAS as on the oldest processor that it supports."""
    config = np.show_config(mode="dicts")
    architecture = config["Machine Information"]["host"]["cpu"]
    env = {
        "NPY_DISABLE_CPU_FEATURES": " ".join(simd()),
        "OPENBLAS_CORETYPE": {"x86_64": "Prescott", "aarch64": "ARMV8"}.get(architecture, ""),
    }
    assert_done(llm_build(model, tmp_path / "bundle", *FLAGS, "-w", weight_type, "--quantizer", "rtn", env=env))
    assert_same_files(tmp_path / "bundle", expected)


def test_numpy_disables_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the previous test would prove nothing."""
    monkeypatch.setenv("NPY_DISABLE_CPU_FEATURES", " ".join(simd()))
    assert simd() == []


@pytest.mark.parametrize(
    "env",
    [
        pytest.param({"PYTHONHASHSEED": "1"}, id="hash seed 1"),
        pytest.param({"PYTHONHASHSEED": "4242"}, id="hash seed 4242"),
        pytest.param({"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}, id="one thread"),
        pytest.param({"OPENBLAS_NUM_THREADS": "7", "OMP_NUM_THREADS": "7"}, id="seven threads"),
        pytest.param({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, id="C locale"),
        pytest.param({"TZ": "Pacific/Chatham", "HOME": "/nonexistent", "USER": "nobody"}, id="somebody elsewhere"),
        pytest.param({"PYTHONOPTIMIZE": "2"}, id="optimised"),
    ],
)
def test_in_another_environment(pristine: Path, expected_s4: Path, tmp_path: Path, env: dict[str, str]) -> None:
    output = tmp_path / "bundle"
    assert_done(llm_build(pristine, output, *FLAGS, "-w", "s4", "--quantizer", "rtn", "--parallel", 2, env=env))
    assert_same_files(output, expected_s4)


@pytest.fixture(scope="module")
def expected_s4(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("expected") / "bundle"
    assert_done(llm_build(pristine, output, *FLAGS, "-w", "s4", "--quantizer", "rtn"))
    return output


def test_nothing_of_the_machine_is_in_a_bundle(expected: Path, model: Path) -> None:
    """No file written by a build contains a path, host or user name."""
    strangers = [str(expected.parent), str(model.parent), os.uname().nodename + ".", str(Path.home()) + "/"]
    for path in expected.rglob("*"):
        if path.is_file() and path.parent.name != "hf":
            data = path.read_bytes()
            assert [stranger for stranger in strangers if stranger.encode() in data] == [], path


def test_a_build_imports_no_torch(pristine: Path, tmp_path: Path) -> None:
    """For safetensors without a tokenizer: importing torch would take longer than the build."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(pristine, folder, ignore=shutil.ignore_patterns("*token*"))
    script = (
        "import sys; from axc.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or any(sys.modules.get(name) for name in ('torch', 'transformers', 'onnxruntime')))"
    )
    arguments = ["llm_build", "--input_path", str(folder), "--output_path", str(tmp_path / "bundle"), "-c", "-1"]
    ran = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment(), capture_output=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, b"")


def test_a_checkpoint_that_changed_between_two_builds_of_one_process(
    pristine: Path, uneven: Path, tmp_path: Path
) -> None:
    """The second build must not read files that the first one opened."""
    folder = tmp_path / "checkpoint"
    for number, source in enumerate((pristine, uneven)):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        output = tmp_path / f"in-process-{number}"
        build.build(build.plan(build.Options(input_path=folder, output_path=output)))
        assert_done(llm_build(folder, tmp_path / f"fresh-{number}"))
        assert_same_files(output, tmp_path / f"fresh-{number}")

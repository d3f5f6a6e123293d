"""The command axrun doctor: exit codes, JSON, and undecided results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from axrun.doctor import figures
from axrun.doctor.report import Report
from tests.axrun.doctor.test_planted import swapped_layers

ROOT = Path(__file__).resolve().parents[3]


def doctor(*words: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "axrun", "doctor", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("engine", ["ax", "ort"])
def test_a_healthy_bundle(engine: str, examined: Path) -> None:
    code, out, err = doctor(str(examined), "--engine", engine, "--json")
    report = Report.parse(json.loads(out))
    assert (code, report.verdict, report.engine, report.maker) == (0, "healthy", engine, "cpu")
    assert err.splitlines()[-1] == "[10/10] answer"


def test_a_fault_is_reported_with_exit_code_1(copy: Path) -> None:
    swapped_layers(copy)
    code, out, err = doctor(str(copy))
    assert code == 1
    assert "layers     disagrees" in out
    assert "it is the axmodel of layer 1" in out.splitlines()[-1]
    assert err.splitlines()[-1].startswith(f"error: {copy} is faulty: layers: layer 0, ")


def test_without_figures_it_is_undecided(bundle_s8: Path) -> None:
    assert not (bundle_s8 / figures.NAME).exists()
    code, out, _ = doctor(str(bundle_s8))
    assert code == 0
    last = out.splitlines()[-1]
    assert last == "undecided: not examined: tokenizer, template, embedding, layers, cache, post, answer"
    assert "`axc reference --bundle` stores them" in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere"], "no bundle folder nowhere"),
        (["nowhere", "--engine", "gpu"], "unknown engine 'gpu'"),
    ],
)
def test_bad_input(words: list[str], told: str) -> None:
    code, out, err = doctor(*words)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {told}")


def test_a_folder_that_is_not_a_bundle_is_bad_input(tmp_path: Path) -> None:
    code, out, err = doctor(str(tmp_path), "--json")
    assert (code, out) == (2, "")
    assert f"{tmp_path} is not a bundle: it has no manifest.json" in err

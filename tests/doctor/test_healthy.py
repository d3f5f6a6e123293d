"""Healthy bundles of every family and type: a doctor finds no fault, with and without a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from axc import build
from tests.doctor.conftest import Base, Doctor, leave_figures
from tests.doctor.healthy import HEALTHY, SYSTEM_ONLY, Healthy

STAGES = 10


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=[pytest.mark.system] * (case.name in SYSTEM_ONLY)) for case in HEALTHY],
)
def test_a_healthy_bundle_has_no_finding(
    case: Healthy, tiny_qwen2: Path, tmp_path: Path, axc_doctor: Doctor, axrun_doctor: Doctor
) -> None:
    checkpoint = case.make(tmp_path / "checkpoint", tiny_qwen2)
    bundle = tmp_path / "bundle"
    build.build(build.plan(build.Options(checkpoint, bundle, **case.options)))
    same = {flag: case.options[flag] for flag in ("model_type",) if flag in case.options}
    leave_figures(bundle, checkpoint, **same)
    flags = [f"--{flag}={value}" for flag, value in same.items()]
    for said, left in ((axc_doctor(bundle, checkpoint, *flags), ""), (axrun_doctor(bundle), case.left)):
        assert (said.code, said.report["verdict"]) == (0, "undecided" if left else "healthy"), said
        assert len(said.report["stages"]) == STAGES
        assert [each["stage"] for each in said.report["stages"] if each["outcome"] != "agrees"] == [left] * bool(left)


def test_there_are_at_least_fifty() -> None:
    assert len(HEALTHY) >= 50
    assert {case.name for case in HEALTHY} > SYSTEM_ONLY
    for flag in ("weight_type", "hidden_state_type"):
        assert {case.options.get(flag) for case in HEALTHY} >= {"fp32", "fp16", "bf16"}


@pytest.mark.parametrize("name", ["s8", "s4", "fp32", "llama", "fp16"])
def test_the_bundles_that_get_faults_are_healthy(
    name: str, base: Base, axc_doctor: Doctor, axrun_doctor: Doctor
) -> None:
    bundle, checkpoint = base(name)
    for engine in ("ax", "ort"):
        for said in (axc_doctor(bundle, checkpoint, "--engine", engine), axrun_doctor(bundle, "--engine", engine)):
            assert (said.code, said.report["verdict"]) == (0, "healthy"), said

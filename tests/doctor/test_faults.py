"""Each planted fault is found in its stage, with its file; none is reported as healthy or undecided."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from axrun.format.bundle import verify
from tests.doctor.conftest import Base, Doctor, Said, placed
from tests.doctor.fault import Fault, RunnerFault
from tests.doctor.faults import BUNDLE, RUNNER

Copy = Callable[[str], tuple[Path, Path]]
SHARED = {"files", "versions", "sampling"}  # stages with the same code in both doctors: tested with one of them
ALONE = [fault for fault in BUNDLE if fault.alone and not SHARED.issuperset(fault.stage.split("|"))]
KEYS = {"stage", "part", "file", "expected", "seen", "cause", "advice"}


def found(said: Said, stage: str, part: str, says: str) -> dict[str, str]:
    """The finding, after checking its stage, part and cause."""
    assert (said.code, said.report.get("verdict")) == (1, "faulty"), said
    finding = said.finding
    assert finding.keys() == KEYS
    assert all(finding[key] for key in KEYS - {"file"}), said
    assert re.fullmatch(stage, finding["stage"]), said
    assert re.search(part, finding["part"]), said
    assert re.search(says, " ".join(finding[key] for key in ("part", "seen", "cause")), re.DOTALL), said
    assert said.report["stages"][-1]["stage"] == finding["stage"], "later stages must not run"
    return finding


@pytest.mark.parametrize("fault", BUNDLE, ids=lambda fault: fault.name)
def test_a_fault_in_the_bundle(fault: Fault, copy: Copy, axc_doctor: Doctor) -> None:
    bundle, checkpoint = copy(fault.base)
    places = placed(fault.file, bundle)
    fault.plant(bundle, checkpoint)
    finding = found(axc_doctor(bundle, checkpoint), fault.stage, fault.part, fault.says)
    assert finding["file"] in places, finding


@pytest.mark.parametrize("fault", ALONE, ids=lambda fault: fault.name)
def test_a_fault_in_the_bundle_without_a_checkpoint(fault: Fault, copy: Copy, axrun_doctor: Doctor) -> None:
    """Found with the figures alone; the cause may need the checkpoint's weights."""
    bundle, checkpoint = copy(fault.base)
    places = placed(fault.file, bundle)
    fault.plant(bundle, checkpoint)
    finding = found(axrun_doctor(bundle), fault.stage, "", "")
    assert finding["file"] in places, finding


@pytest.mark.parametrize("fault", RUNNER, ids=lambda fault: fault.name)
def test_a_fault_of_the_runner(
    fault: RunnerFault, base: Base, monkeypatch: pytest.MonkeyPatch, axc_doctor: Doctor
) -> None:
    bundle, checkpoint = base(fault.base)
    fault.plant(monkeypatch)
    found(axc_doctor(bundle, checkpoint), fault.stage, fault.part, fault.says)


@pytest.mark.parametrize("fault", [fault for fault in RUNNER if fault.alone], ids=lambda fault: fault.name)
def test_a_fault_of_the_runner_without_a_checkpoint(
    fault: RunnerFault, base: Base, monkeypatch: pytest.MonkeyPatch, axrun_doctor: Doctor
) -> None:
    bundle, _ = base(fault.base)
    fault.plant(monkeypatch)
    found(axrun_doctor(bundle), fault.stage, "", "")


def test_the_faults_cover_every_stage() -> None:
    faults: list[Fault | RunnerFault] = [*BUNDLE, *RUNNER]
    names = [fault.name for fault in faults]
    assert len(names) == len(set(names)) >= 40
    stages = {stage for fault in faults for stage in fault.stage.split("|")}
    assert len(stages) == 10, stages


@pytest.mark.parametrize("name", ["s8", "s4", "fp32", "llama", "fp16"])
def test_the_healthy_bundles_are_still_intact(name: str, base: Base) -> None:
    """Copies are hard links: a fault that writes into a file in place would damage the original."""
    verify(base(name)[0])

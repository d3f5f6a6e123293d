"""Incompatible versions are reported; versions that are not in the tables are reported as unknown."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from axrun.doctor import compatibility
from axrun.doctor.installed import Engine, Installed, ask, look
from axrun.doctor.report import Finding
from axrun.doctor.stages import NotExamined
from axrun.doctor.versions import versions
from axrun.format import axmodel
from axrun.format.bundle import MANIFEST, Bundle
from axrun.session.libax_engine import EXTENSIONS, FOLDER
from tests.ci import plants

OURS = Engine("/release/engine/lib", "axc 0.1.0", "AX650", EXTENSIONS)
SOC = Engine("/soc/lib", "2.12.0s", "AX650")
HOST = Installed("", "", OURS, None, "x86_64", "3.11.7", "glibc 2.36")
BOARD = Installed("Ax_Version V3.6.2_20250731140456", "AX650N_CHIP", OURS, SOC, "aarch64", "3.10.12", "glibc 2.35")


@pytest.fixture(scope="session")
def vendors(bundle_s8: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with manifest, file names and axmodel headers like those of the vendor's compiler."""
    folder = shutil.copytree(bundle_s8, tmp_path_factory.mktemp("vendors") / "tiny")
    bundle = Bundle.open(folder)
    for path in [*(bundle.layer_path(index) for index in range(bundle.layers)), bundle.post_path]:
        model = dataclasses.replace(axmodel.read(path), producer_name="Pulsar2", producer_version="4.1-patch1")
        path.write_bytes(axmodel.encode(model))
        plants.agree(folder, path.name)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest.update(maker="pulsar2", tools={"pulsar2": "version: 4.1-patch1", "axc": "0.1.0"})
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return Bundle.open(folder)


def with_engine(machine: Installed, **changes: object) -> Installed:
    engine = machine.vendors if machine.vendors else machine.ours
    assert engine
    changed = dataclasses.replace(engine, **changes)  # type: ignore[arg-type]
    return (
        dataclasses.replace(machine, vendors=changed) if machine.vendors else dataclasses.replace(machine, ours=changed)
    )


def test_ours_on_this_machine_and_on_a_board(bundle_s8: Path) -> None:
    bundle = Bundle.open(bundle_s8)
    said = versions(bundle, "ax", HOST)
    assert isinstance(said, str)
    assert f"extensions {EXTENSIONS}" in said
    assert "no BSP" in said
    said = versions(bundle, "ax", BOARD)
    assert isinstance(said, str)
    assert "BSP Ax_Version V3.6.2_20250731140456; chip AX650N_CHIP" in said


@pytest.mark.parametrize(
    ("machine", "part", "cause"),
    [
        (dataclasses.replace(HOST, ours=None), "no engine for axmodels of axc", "without an engine"),
        (with_engine(HOST, extensions=2), "does not belong to this axrun", "another release"),
        (with_engine(HOST, extensions=0), "does not belong to this axrun", "not axc's"),
        (with_engine(HOST, fault="x.so: wrong ELF class: ELFCLASS32"), "does not load", "another machine"),
        (with_engine(HOST, fault="version `GLIBC_2.38' not found"), "does not load", "newer C library"),
        (with_engine(HOST, fault="x.so: file too short"), "does not load", "cut short"),
    ],
)
def test_an_engine_that_does_not_fit_ours(machine: Installed, part: str, cause: str, bundle_s8: Path) -> None:
    found = versions(Bundle.open(bundle_s8), "ax", machine)
    assert isinstance(found, Finding)
    assert part in found.part
    assert cause in found.cause
    assert isinstance(versions(Bundle.open(bundle_s8), "ort", machine), str)


def test_the_vendors_on_a_board_that_fits(vendors: Bundle) -> None:
    said = versions(vendors, "ax", BOARD)
    assert isinstance(said, str), said
    assert "engine 2.12.0s; Pulsar2 " in said
    assert "not in the table" not in said


@pytest.mark.parametrize(
    ("machine", "part", "cause"),
    [
        (dataclasses.replace(BOARD, vendors=None), "no engine for the NPU", "not mounted"),
        (with_engine(BOARD, extensions=3), "axc's engine is installed instead", FOLDER),
        (dataclasses.replace(BOARD, chip_type="AX630C_CHIP"), "built for another chip", "--chip"),
        (dataclasses.replace(BOARD, bsp="Ax_Version V1.45.0_P37_x"), "too old", "CreateHandle"),
        (
            with_engine(BOARD, fault="libax_interpreter.so: cannot open shared object file"),
            "load",
            "is missing beside it",
        ),
    ],
)
def test_a_board_that_does_not_fit_the_vendors(machine: Installed, part: str, cause: str, vendors: Bundle) -> None:
    found = versions(vendors, "ax", machine)
    assert isinstance(found, Finding)
    assert part in found.part
    assert cause in found.cause


def test_unknown_versions_are_reported(vendors: Bundle) -> None:
    machine = with_engine(dataclasses.replace(BOARD, bsp="Ax_Version V9.9.0"), version="9.1s")
    said = versions(vendors, "ax", machine)
    assert isinstance(said, str)
    assert "BSP Ax_Version V9.9.0 (not in the table: compatibility unknown)" in said
    assert "engine 9.1s (not in the table: compatibility unknown)" in said


def test_the_vendors_without_a_board(vendors: Bundle) -> None:
    with pytest.raises(NotExamined, match="no driver and no engine"):
        versions(vendors, "ax", HOST)


def test_an_axmodel_of_another_compiler(copy: Path) -> None:
    name = "qwen2_p32_l3_together.axmodel"
    content = axmodel.encode(dataclasses.replace(axmodel.read(copy / name), producer_version="0.0.9"))
    (copy / name).write_bytes(content)
    found = versions(Bundle.open(copy), "ax", HOST)
    assert isinstance(found, Finding)
    assert (found.file, found.seen) == (name, "0.0.9")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Ax_Version V1.45.0_P39_20240830", (1, 45, 0, 39)),
        ("Ax_Version V3.6.2_20250731140456", (3, 6, 2)),
        ("2.10.1s", (2, 10, 1)),
        ("5.2-patch1", (5, 2)),
        ("", ()),
        ("nothing", ()),
    ],
)
def test_numbers_of_versions(text: str, number: tuple[int, ...]) -> None:
    assert compatibility.number(text) == number


LIBRARY = """
const char* AX_ENGINE_GetVersion(void) { return "2.12.0s"; }
int AX_ENGINE_SetAffinity(void) { return 0; }
"""


def test_a_board_is_queried_through_its_libraries_and_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    proc, soc = tmp_path / "proc", tmp_path / "lib"
    proc.mkdir()
    soc.mkdir()
    (proc / "version").write_text("Ax_Version V3.6.2_20250731140456\n\x1b[0m")
    (proc / "chip_type").write_text("AX650N_CHIP\n")
    for name, source in (("sys", ""), ("engine", LIBRARY)):
        command = ["cc", "-shared", "-x", "c", "-o", str(soc / f"libax_{name}.so"), "-"]
        subprocess.run(command, input=source.encode(), check=True)
    found = look(proc, soc)
    assert (found.bsp, found.chip_type, found.chip) == (
        "Ax_Version V3.6.2_20250731140456",
        "AX650N_CHIP",
        "AX650",
    )
    assert found.vendors == Engine(str(soc), "2.12.0s", "AX650", 0, interpreter=False)
    assert found.ours is not None
    assert found.ours.extensions == EXTENSIONS


def test_an_invalid_library_is_reported(tmp_path: Path) -> None:
    for name in ("sys", "engine"):
        (tmp_path / f"libax_{name}.so").write_bytes(b"\x7fELF and no more")
    assert "file too short" in ask(str(tmp_path)).fault or "ELF" in ask(str(tmp_path)).fault

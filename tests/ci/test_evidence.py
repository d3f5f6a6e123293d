"""A board compared with its deploy record: every planted difference is found and names its file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import marshal
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from axrun.errors import BadInput
from axrun.format.bundle import MANIFEST, read_manifest, sha256
from ci.device import evidence
from ci.device.evidence import Record, compare, differences
from ci.device.listing import Listing
from ci.device.on_board import compiled, tree
from ci.device.on_board.releases import Releases

Plant = Callable[[Path, Record], None]
LIBRARY = "axrun/engine/lib/libax_engine.so"
PYTHON = {
    **dict.fromkeys(("found", "program"), "/usr/bin/python3.11"),
    **dict.fromkeys(("found_sha256", "program_sha256"), "a" * 64),
    "version": "3.11.2",
}


@pytest.fixture(scope="module")
def deployed(bundle_s8: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Record]:
    """A folder of releases as deploys leave it, with an older release, and the record of the last."""
    root = tmp_path_factory.mktemp("board") / "axrun"
    root.mkdir()
    package = root.with_name("package")
    (package / LIBRARY).parent.mkdir(parents=True)
    (package / "bin").mkdir()
    for name, text in (("bin/axrun", "#!/bin/sh\n"), ("axrun/evaluate.py", "new = 1\n"), (LIBRARY, "\x7fELF")):
        (package / name).write_text(text)
    make(root, package, bundle_s8, "an older one")
    (package / "axrun" / "evaluate.py").write_text("new = 2\n")
    return root, make(root, package, bundle_s8, "the last one")


def make(root: Path, package: Path, bundle: Path, prompt: str) -> Record:
    """What ci.device.deploy does, on this machine's disk."""
    releases = Releases(str(root))
    listings = {"packages": Listing.of(package), "models": Listing.of(bundle)}
    for store, source in (("packages", package), ("models", bundle)):
        listing = [list(entry) for entry in listings[store].files]
        found = releases.survey(store, listings[store].id, listing)
        if not found["whole"]:
            shutil.copytree(source, found["into"], dirs_exist_ok=True)
        assert releases.verify(store, listings[store].id, listing) == []
        releases.keep(store, listings[store].id, listing)
    release = {"package": listings["packages"].id, "model": listings["models"].id, "prompt": prompt}
    text = json.dumps(release, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    releases.assemble(digest[:16], release)
    releases.switch(digest[:16])
    package_files, model_files = (evidence.files(listings[store]) for store in ("packages", "models"))
    return Record("host", digest[:16], release["package"], release["model"], digest, package_files, model_files, PYTHON)


@pytest.fixture
def board(deployed: tuple[Path, Record], tmp_path: Path) -> tuple[Path, Record]:
    """A copy to plant something in."""
    root = shutil.copytree(deployed[0], tmp_path / "axrun", symlinks=True)
    return root, deployed[1]


def inventory(root: Path, record: Record) -> dict[str, Any]:
    return {**Releases(str(root)).inventory(record.release, record.package, record.model), "python": PYTHON}


def older(root: Path, record: Record) -> str:
    """The name of the release before."""
    return next(path.name for path in (root / "releases").iterdir() if path.name != record.release)


def test_an_unchanged_deploy_has_no_differences(board: tuple[Path, Record]) -> None:
    root, record = board
    assert compare(record, inventory(root, record)) == []


def another_tokenizer(root: Path, record: Record) -> None:
    file = root / "models" / record.model / "hf" / "tokenizer.json"
    file.write_text(file.read_text().replace("1", "2", 1))


def another_layer(root: Path, record: Record) -> None:
    """Of the same size, and the manifest made to agree."""
    model = root / "models" / record.model
    name = "qwen2_p32_l2_together.axmodel"
    shutil.copyfile(model / "qwen2_p32_l1_together.axmodel", model / name)
    manifest = json.loads((model / MANIFEST).read_text())
    manifest["files"][name]["sha256"] = sha256(model / name)
    (model / MANIFEST).write_text(json.dumps(manifest))


def current_is_older(root: Path, record: Record) -> None:
    (root / "current").unlink()
    (root / "current").symlink_to(f"releases/{older(root, record)}")


def current_is_a_folder(root: Path, record: Record) -> None:
    (root / "current").unlink()
    shutil.copytree(root / "releases" / record.release, root / "current", symlinks=True)


def release_has_the_older_package(root: Path, record: Record) -> None:
    release = root / "releases" / record.release
    (release / "package").unlink()
    shutil.copy(root / "releases" / older(root, record) / "package", release / "package", follow_symlinks=False)


def older_runner_over_the_package(root: Path, record: Record) -> None:
    folders = [path for path in (root / "packages").iterdir() if path.is_dir()]
    (before,) = (path for path in folders if path.name != record.package)
    shutil.copyfile(before / "axrun" / "evaluate.py", root / "packages" / record.package / "axrun" / "evaluate.py")


def package_is_a_link(root: Path, record: Record) -> None:
    package = root / "packages" / record.package
    package.rename(root / "elsewhere")
    package.symlink_to(root / "elsewhere")


def packages_is_a_link(root: Path, record: Record) -> None:
    (root / "packages").rename(root / "elsewhere")
    (root / "packages").symlink_to("elsewhere")


def a_file_is_a_link_to_the_same_bytes(root: Path, record: Record) -> None:
    file = root / "models" / record.model / "config.json"
    file.rename(root / "config.json")
    file.symlink_to(root / "config.json")


def added(name: str) -> Plant:
    def plant(root: Path, record: Record) -> None:
        file = root / "packages" / record.package / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"0")

    return plant


def an_empty_folder(root: Path, record: Record) -> None:
    (root / "packages" / record.package / "numpy").mkdir()


def another_engine(root: Path, record: Record) -> None:
    (root / "packages" / record.package / LIBRARY).write_text("\x7fELV")


def engine_is_gone(root: Path, record: Record) -> None:
    (root / "packages" / record.package / LIBRARY).unlink()


def a_device_in_its_place(root: Path, record: Record) -> None:
    file = root / "models" / record.model / "post_config.json"
    file.unlink()
    os.mkfifo(file)


def another_question(root: Path, record: Record) -> None:
    file = root / "releases" / record.release / "release.json"
    file.write_text(file.read_text().replace("last", "next"))


@pytest.mark.parametrize(
    ("plant", "told"),
    [
        (another_tokenizer, "models/{model}/hf/tokenizer.json has other bytes than were deployed (sha256 "),
        (another_layer, "models/{model}/manifest.json has other bytes than were deployed"),
        (another_layer, "models/{model}/qwen2_p32_l2_together.axmodel has other bytes than were deployed"),
        (current_is_older, "current points at releases/{older}, deployed was releases/{release}"),
        (current_is_a_folder, "current points at no link, deployed was releases/{release}"),
        (release_has_the_older_package, "releases/{release}/package is link to ../../packages/"),
        (older_runner_over_the_package, "packages/{package}/axrun/evaluate.py has other bytes than were deployed"),
        (package_is_a_link, "packages/{package} is link to "),
        (packages_is_a_link, "packages is link to elsewhere, expected a folder of its own"),
        (a_file_is_a_link_to_the_same_bytes, "models/{model}/config.json is link to "),
        (added("sitecustomize.py"), "packages/{package}/sitecustomize.py was not deployed: a file"),
        (added("numpy.py"), "packages/{package}/numpy.py was not deployed: a file"),
        (added("axrun/__pycache__/evaluate.cpython-311.pyc"), "axrun/__pycache__/evaluate.cpython-311.pyc was not"),
        (an_empty_folder, "packages/{package}/numpy was not deployed: empty folder"),
        (another_engine, "packages/{package}/axrun/engine/lib/libax_engine.so has other bytes than were deployed"),
        (engine_is_gone, "packages/{package}/axrun/engine/lib/libax_engine.so is missing"),
        (a_device_in_its_place, "models/{model}/post_config.json is no file, deployed was a file"),
        (another_question, "releases/{release}/release.json has other bytes than were deployed"),
    ],
)
def test_a_difference_names_its_file(plant: Plant, told: str, board: tuple[Path, Record]) -> None:
    root, record = board
    plant(root, record)
    faults = compare(record, inventory(root, record))
    expected = told.format(**record.named(), older=older(root, record))
    assert any(expected in fault for fault in faults), faults


def test_a_record_is_read_as_it_was_written(deployed: tuple[Path, Record], tmp_path: Path) -> None:
    file = evidence.place(tmp_path, "host")
    evidence.write(file, deployed[1])
    assert evidence.read(file) == deployed[1]
    with pytest.raises(BadInput, match="no deploy is recorded in"):
        evidence.read(tmp_path / "none.json")
    file.write_text('{"schema": 1}')
    with pytest.raises(BadInput, match="is not the record of a deploy"):
        evidence.read(file)


def test_libraries_are_the_packages_own(deployed: tuple[Path, Record]) -> None:
    record = deployed[1]
    inside = f"/home/board/axrun/packages/{record.package}/{LIBRARY}"
    good = {inside: record.package_files[LIBRARY], "/lib/libc.so.6": "1" * 64}

    def told(libraries: dict[str, str], variables: tuple[str, ...] = ("HOME",), ours: bool = True) -> list[str]:
        return evidence.loaded(record, "/home/board/axrun", libraries, variables, ours)

    assert told(good) == []
    assert evidence.engine(good) == {"path": inside, "sha256": record.package_files[LIBRARY]}
    (fault,) = told({**good, inside: "2" * 64})
    assert fault.endswith("libax_engine.so was loaded but differs from the deployed file (sha256 222222222222)")
    (fault,) = told({"/soc/lib/libax_engine.so": "3" * 64})
    assert fault == "/soc/lib/libax_engine.so was loaded instead of the package's libax_engine.so"
    assert told({"/soc/lib/libax_engine.so": "3" * 64}, ours=False) == []  # the vendor's axmodels need the vendor's
    assert told({}) == ["no libax_engine.so was loaded: the engine that ran is unknown"]
    (fault,) = told(good, ("AXC_ISA", "LD_LIBRARY_PATH"))
    assert fault == "the board's environment sets AXC_ISA, which changes what runs"


def test_figures_must_name_the_built_and_deployed_release(deployed: tuple[Path, Record], bundle_s8: Path) -> None:
    record, manifest = deployed[1], read_manifest(bundle_s8)
    named = {**record.named(), "faults": []}
    measured = {"manifest_sha256": record.manifest_sha256}
    good = {"evidence": named, "bench": measured}
    assert differences(record, manifest, good) == []
    assert differences(record, manifest, {}) == ["the measured release is unknown: figures.json has no evidence"]
    for key in named.keys() - {"faults"}:
        (fault,) = differences(record, manifest, {**good, "evidence": {**named, key: "0" * 16}})
        assert fault.startswith(f"the measured {key} is '0000000000000000', deployed was ")
    (fault,) = differences(record, manifest, {**good, "bench": {"manifest_sha256": "0"}})
    assert fault == "axrun bench measured a bundle whose manifest.json differs from the deployed one"
    (fault,) = differences(record, manifest, {**good, "evidence": {**named, "faults": ["x.py is missing"]}})
    assert fault == "x.py is missing"
    other = dataclasses.replace(record, model_files={**record.model_files, "hf/tokenizer.json": "0" * 64})
    assert "hf/tokenizer.json differs between build and deploy" in differences(other, manifest, good)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"program_sha256": "b" * 64, "found_sha256": "b" * 64},
            f"python3 is /usr/bin/python3.11 (3.11.2, sha256 {'b' * 12}), deployed with was /usr/bin/python3.11 (3.11",
        ),
        (
            {"found": "/home/me/bin/python3", "found_sha256": "c" * 64},
            f"python3 is /home/me/bin/python3 (sha256 {'c' * 12}), which runs /usr/bin/python3.11 (3.11.2, ",
        ),
    ],
)
def test_another_interpreter_is_a_difference(change: dict[str, str], told: str, board: tuple[Path, Record]) -> None:
    root, record = board
    (fault,) = compare(record, {**inventory(root, record), "python": {**PYTHON, **change}})
    assert fault.startswith(told)


def test_the_interpreter_that_a_command_finds_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tree.interpreter()
    assert real["program"] == os.path.realpath(sys.executable)
    assert real["program_sha256"] == hashlib.sha256(Path(sys.executable).read_bytes()).hexdigest()
    shadow = tmp_path / "python3"
    shadow.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    shadow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    seen = tree.interpreter()
    assert seen["found"] == str(shadow)
    assert seen["found_sha256"] == hashlib.sha256(shadow.read_bytes()).hexdigest()
    assert evidence.wrapped(seen).startswith(f"{shadow} (sha256 ")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert tree.interpreter()["found_sha256"] == "unreadable"


def test_bytecode_must_match_its_source(tmp_path: Path) -> None:
    sources, folder = tmp_path / "package", tmp_path / "package.compiled"
    sources.mkdir()
    for name in ("one", "two", "three"):
        (sources / f"{name}.py").write_text(f'"""A module."""\ndef said(): return ["{name}", 1.5, (b"x", None)]\n')
    flags = ["-I", "-S", "-X", f"pycache_prefix={folder}"]
    run = f"import sys; sys.path.insert(0, {str(sources)!r}); import one, two, three"
    subprocess.run([sys.executable, *flags, "-c", run], check=True, timeout=60)
    assert compiled.faults(folder, 60) == []
    kept = {path.name.partition(".")[0]: path for path in folder.rglob("*.pyc")}
    planted = marshal.dumps(compile("def said(): return 'planted'", str(sources / "two.py"), "exec"))
    kept["two"].write_bytes(kept["two"].read_bytes()[:16] + planted)  # time and size of the source, as Python asks
    asked = [sys.executable, *flags, "-c", f"{run}; print(two.said())"]
    assert subprocess.run(asked, capture_output=True, text=True, timeout=60).stdout == "planted\n"
    kept["three"].write_bytes(kept["three"].read_bytes()[:30])
    (folder / "more.so").write_text("")
    faults = "\n".join(compiled.faults(folder, 60))
    assert faults.count("\n") == 2
    assert "more.so is not a .pyc file" in faults
    assert f" cannot be compared with {sources / 'three.py'}: " in faults
    assert f" is not what Python compiles of {sources / 'two.py'}" in faults
    assert compiled.faults(folder, -1)[0].endswith(" were not checked within -1 s")

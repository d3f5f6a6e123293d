"""The digest that identifies a compiler: what changes it, and what does not."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from axc import VERSION, identity
from axc.calibration import text
from axc.identity import COMPUTING, PLACES, digest, digest_of, sources
from tests.axc.axc import ROOT, assert_done, axc

DECIDING = sources(PLACES)
# Their results are not in a bundle, except data that the checkpoint has already.
READING = {"jinja2", "llguidance", "safetensors", "torch"}
REPAIRING = {"tokenizers", "transformers"}  # named by the manifests of bundles whose tokenizer they repaired


@pytest.fixture
def copy(tmp_path: Path) -> Mapping[str, Path]:
    """A copy of the sources of both packages."""
    for name, place in PLACES.items():
        shutil.copytree(place, tmp_path / name, ignore=shutil.ignore_patterns("engine", "__pycache__"))
    return {name: tmp_path / name for name in PLACES}


def mine(places: Mapping[str, Path], name: str) -> Path:
    """A file of ours in a copy."""
    package = name.partition(".")[0]
    return places[package] / DECIDING[name].relative_to(PLACES[package])


def test_a_copy_elsewhere_is_the_same_compiler(copy: Mapping[str, Path]) -> None:
    assert digest_of(copy) == digest()


def test_line_ends_bytecode_and_unused_modules_do_not_count(copy: Mapping[str, Path]) -> None:
    for name in DECIDING:
        path = mine(copy, name)
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    (copy["axc"] / "__pycache__").mkdir()
    (copy["axc"] / "__pycache__" / "rope.cpython-311.pyc").write_bytes(b"\0")
    for unused in (copy["axc"] / "console.py", copy["axrun"] / "serve" / "app.py"):
        unused.write_text(unused.read_text() + "\nX = 1\n")
    assert digest_of(copy) == digest()


def test_an_edit_of_any_source_of_a_build_is_another_compiler(copy: Mapping[str, Path]) -> None:
    seen = {digest()}
    for name in DECIDING:
        path = mine(copy, name)
        path.write_text(path.read_text() + "\nX = 1\n")
        seen.add(digest_of(copy))
    assert len(seen) == 1 + len(DECIDING)


def test_modules_looked_up_by_name_count(copy: Mapping[str, Path]) -> None:
    (copy["axc"] / "families" / "mine.py").write_text("X = 1\n")
    assert digest_of(copy) != digest()


def test_a_renamed_module_is_another_compiler(copy: Mapping[str, Path]) -> None:
    folder = copy["axc"] / "families"
    (folder / "llama.py").rename(folder / "lama.py")
    assert digest_of(copy) != digest()


def test_missing_sources_are_an_error(copy: Mapping[str, Path]) -> None:
    (copy["axc"] / "build.py").unlink()
    with pytest.raises(FileNotFoundError, match="axc needs its own sources"):
        digest_of(copy)


SEEN = """
import json, sys
from pathlib import Path
from axc.build import Options, build, plan
build(plan(Options(input_path=Path(sys.argv[1]), output_path=Path(sys.argv[2]))))
import axc.pulsar2
print(json.dumps([name for name in sys.modules if name.partition(".")[0] in ("axc", "axrun")]))
"""


def test_every_module_of_ours_that_a_build_loads_is_in_the_digest(tiny_qwen2: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SEEN, str(tiny_qwen2), str(tmp_path / "bundle")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(json.loads(done.stdout)) <= set(DECIDING)
    assert {"axc.rope", "axc.axmodel.writer", "axrun.format.dtypes", "axrun.format.wire"} <= set(DECIDING)


def test_every_package_used_by_a_build_is_classified() -> None:
    found = set()
    for path in DECIDING.values():
        tree = ast.parse(path.read_text())
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level], path
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found |= {*names, *([str(node.module)] if isinstance(node, ast.ImportFrom) else [])}
    packages = {name.partition(".")[0] for name in found} - set(sys.stdlib_module_names) - {"axc", "axrun"}
    assert packages - {"typing_extensions"} == {*COMPUTING, *READING, *REPAIRING}


def test_the_compiler_is_only_python() -> None:
    """Data files would affect bundles without changing the digest. A calibration text has its own digest."""
    files = {path for path in PLACES["axc"].rglob("*") if path.is_file()} - {text.DEFAULT}
    assert {path.suffix for path in files} <= {".py", ".pyc"}


def test_the_wheels_are_the_same_compiler(tmp_path: Path) -> None:
    for folder in (ROOT, ROOT / "board"):
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
        subprocess.run(command, cwd=folder, env={"AXRUN_TARGET": "pure"}, capture_output=True, check=True)
    for wheel in tmp_path.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tmp_path / "installed")
    assert axc("--version", cwd=tmp_path / "installed", env={"PYTHONPATH": ""}).out == axc("--version").out
    code = "import axc; print(*axc.__path__)"
    seen = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "installed", capture_output=True, text=True)
    assert seen.stdout.strip() == str(tmp_path / "installed" / "axc")


def test_version_manifest_verify_and_inspect_name_it(bundle_s8: Path) -> None:
    assert axc("--version").out == f"axc {VERSION} (digest {digest()})\n"
    words = f"axc {VERSION}, digest {digest()}, gguf "
    for verb in ("verify", "inspect"):
        ended = axc(verb, bundle_s8)
        assert_done(ended)
        assert words in ended.out
        assert json.loads(axc(verb, bundle_s8, "--json").out)["tools"] == identity.tools()

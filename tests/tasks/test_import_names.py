"""Import names are axc, axrun and ci; `board` would clash with a third-party module used on such boards."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "axrun": (ROOT / "board" / "axrun", {"axc", "ci"}),
    "axc": (ROOT / "toolchain" / "axc", {"ci"}),
    "ci.device": (ROOT / "ci" / "device", {"ci.nightly", "ci.tasks"}),
    "ci.container": (ROOT / "ci" / "container", {"ci.nightly", "ci.tasks"}),
}
SHADOW = "__path__ = []\nINSTALLED = 'by somebody else'\n"


def imported(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every module imported anywhere in the sources in `folder`."""
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from ((path, f"{node.module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    folder, closed = PACKAGES[package]
    found = list(imported(folder))
    assert found
    assert [(str(path), name) for path, name in found for room in closed if f"{name}.".startswith(f"{room}.")] == []


def test_no_import_uses_a_folder_name() -> None:
    """At the root of a checkout Python would find them, as packages without __init__.py."""
    rooms = ("board", "ci", "models", "requirements", "tests", "toolchain")
    found = [pair for room in rooms for pair in imported(ROOT / room)]
    assert {name.partition(".")[0] for _, name in found} & {"axc", "axrun", "ci"} == {"axc", "axrun", "ci"}
    assert [(str(path), name) for path, name in found if name.partition(".")[0] in ("board", "toolchain")] == []


def test_a_foreign_module_named_board_can_be_imported(tmp_path: Path) -> None:
    """Adafruit Blinka installs `board` in site-packages, which is searched after the checkout."""
    (tmp_path / "board.py").write_text(SHADOW)
    code = "import sys; sys.path.append(sys.argv[1]); import axc, axrun, ci, board; print(board.INSTALLED)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "by somebody else\n"

"""The witness program, run on this machine: libraries that a command loads, and its memory."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from axrun.errors import CheckFailed
from axrun.session.libax_engine import BESIDE
from ci.device import place
from ci.device.evidence import Record
from tests.hil.on_board import OnBoard, Otherwise

LIBRARY = "axrun/engine/lib/libax_engine.so"


HERE = ["sh", "-c"]  # in place of ssh to a board


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two libraries of one name: as deployed, and one of other bytes that can be loaded as well."""
    folder = tmp_path_factory.mktemp("libraries")
    ours = (BESIDE / "libax_engine.so").read_bytes()
    for name, data in (("deployed", ours), ("other", ours + b"another")):
        (folder / name).mkdir()
        (folder / name / "libax_engine.so").write_bytes(data)
    return folder


@pytest.fixture
def board(libraries: Path, tmp_path: Path) -> OnBoard:
    """A release whose axrun loads the engine that ENGINE names, says what it was told to, and ends."""
    root = tmp_path / "axrun"
    package = root / "packages" / ("1" * 16)
    (package / LIBRARY).parent.mkdir(parents=True)
    (package / LIBRARY).write_bytes((libraries / "deployed" / "libax_engine.so").read_bytes())
    (root / "releases" / ("0" * 16)).mkdir(parents=True)
    launcher = root / "releases" / ("0" * 16) / "axrun"
    files = {LIBRARY: hashlib.sha256((package / LIBRARY).read_bytes()).hexdigest()}
    record = Record("virtual", "0" * 16, "1" * 16, "2" * 16, "", files, {})
    found = OnBoard(place.find("virtual"), HERE, 60.0, record, str(root))
    tell(launcher, package / LIBRARY, 'print(\'{"maker": "cpu"}\')')
    return found


def tell(launcher: Path, engine: Path | None, code: str) -> None:
    loaded = [str(BESIDE / "libax_sys.so"), str(engine)] if engine else []
    load = f"import ctypes, time\nfor path in {loaded}: ctypes.CDLL(path, ctypes.RTLD_GLOBAL)\ntime.sleep(0.3)\n"
    launcher.write_text(f"#!{sys.executable}\n{load}{code}\n")
    launcher.chmod(0o755)


def launcher(board: OnBoard) -> Path:
    return Path(board.release) / "axrun"


def test_the_engine_that_was_loaded_is_named(board: OnBoard) -> None:
    said, seconds = board.axrun("eval")
    assert said == {"maker": "cpu"}
    assert 0 < seconds < 60
    engine = board.seen["evidence"]["library"]
    assert engine["path"].endswith(f"/packages/{'1' * 16}/{LIBRARY}")
    assert engine["sha256"] == board.record.package_files[LIBRARY]


@pytest.mark.parametrize("where", ["beside", "swapped", "none"])
def test_another_engine_than_the_deployed_one_is_a_fault(where: str, board: OnBoard, libraries: Path) -> None:
    inside = Path(board.root) / "packages" / ("1" * 16) / LIBRARY
    other = libraries / "other" / "libax_engine.so"
    if where == "swapped":
        inside.write_bytes(other.read_bytes())
    tell(launcher(board), {"beside": other, "swapped": inside, "none": None}[where], 'print(\'{"maker": "cpu"}\')')
    told = {
        "beside": f"{other} was loaded instead of the package's libax_engine.so",
        "swapped": "libax_engine.so was loaded but differs from the deployed file",
        "none": "no libax_engine.so was loaded: the engine that ran is unknown",
    }[where]
    with pytest.raises(Otherwise) as caught:
        board.axrun("eval")
    assert str(caught.value).startswith("axrun eval on virtual differs from the deploy: ")
    assert told in str(caught.value)
    assert told in board.seen["evidence"]["faults"][0]


def test_a_variable_that_changes_the_engine_is_a_fault(board: OnBoard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AXC_ISA", "scalar")
    with pytest.raises(Otherwise, match="the board's environment sets AXC_ISA, which changes what runs"):
        board.axrun("eval")


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (
            "import os; os.kill(os.getpid(), 9)",
            r"axrun eval was killed on virtual: it used \d+ MB, the board had at least ",
        ),
        ("raise SystemExit('error: no room')", "axrun eval on virtual ended with 1: 'no room'"),
        ("print('hello')", r"axrun eval on virtual answers 'hello\\n', expected a JSON object"),
        (
            "print('{\"ttft\": NaN}')",
            "does not answer with a JSON object: it has NaN, which is not a JSON number",
        ),
        (
            "print('[' + '9' * 400 + ']')",
            "answer with a JSON object: it has the number 99999999999999999999...",
        ),
        ("print('[1]')", "expected a JSON object"),
    ],
)
def test_a_command_that_fails_says_how(code: str, told: str, board: OnBoard) -> None:
    tell(launcher(board), None, code)
    with pytest.raises(CheckFailed, match=told):
        board.axrun("eval")


def test_a_program_runs_with_the_packages_modules_alone(board: OnBoard, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path(board.root) / "packages" / ("1" * 16)
    (package / "mine.py").write_text("name = 'the package'\n")
    shadow = package.parent / "shadow"
    shadow.mkdir()
    (shadow / "mine.py").write_text("name = 'a shadow'\n")
    (shadow / "sitecustomize.py").write_text("print('customized')\n")
    monkeypatch.setenv("PYTHONPATH", str(shadow))
    assert board.python("a program", "import mine; print(mine.name, sys.argv[1:])", "a b") == "the package ['a b']\n"
    assert not (package / "__pycache__").exists()
    assert (package.parent / f"{package.name}.compiled").is_dir()

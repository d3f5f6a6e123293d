"""The Makefile and tasks.py as a user sees them: commands in, text and exit codes out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from ci.tasks.common import CONTAINER_SETTINGS, SETTINGS
from requirements.install import SETS, fingerprint

ROOT = Path(__file__).resolve().parents[2]
TARGETS = [
    *("base-image", "bench", "build", "clean", "engine", "image", "lint", "page", "run", "setup", "test", "test-all"),
    "verify-reproducible",
    "wheels",
]
AWKWARD = """what's $HOME $$1 $(shell id) `id` "2+2"? # \\ % ; é"""


def call(*command: str, cwd: Path = ROOT, said: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
    return subprocess.run(
        command,
        cwd=cwd,
        env={**kept, **(said or {})},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def venv(tmp_path: Path) -> str:
    """The environment of this test run under another path, complete from the view of `make`."""
    script(tmp_path / "venv" / "bin" / "python", f'exec "{sys.executable}" "$@"')
    (tmp_path / "venv" / "build.installed").write_text(fingerprint(SETS["build"].files))
    return f"VENV={tmp_path / 'venv'}"


@pytest.mark.parametrize("words", [[], ["help"]])
def test_make_alone_only_lists_the_targets(words: list[str], tmp_path: Path) -> None:
    done = call("make", *words, f"VENV={tmp_path / 'none'}")
    assert done.returncode == 0
    assert sorted(re.findall(r"^make ([\w-]+)  ", done.stdout, re.M)) == sorted([*TARGETS, "help"])
    for variable in (*SETTINGS, *CONTAINER_SETTINGS, "PYTHON", "VENV"):
        assert re.search(rf"\b{variable}\b", done.stdout)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_is_one_line_that_calls_its_task(target: str, venv: str) -> None:
    done = call("make", "-n", target, venv)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == f'"{venv.partition("=")[2]}/bin/python" -m invoke {target}'


def test_invoke_lists_the_same_tasks() -> None:
    done = call(sys.executable, "-m", "invoke", "--list")
    assert done.returncode == 0
    further = [
        *(f"board.{name}" for name in ("ask", "serve", "shell", "status")),
        "board.doctor",
        "board.down",
        "board.free",
        "board.health",
        "board.soak",
        "board.up",
        "cross",
        "deploy",
        "gate.record",
        "lock",
        "nightly",
        "rollback",
        "site",
    ]
    assert sorted(re.findall(r"^  ([\w.-]+)  ", done.stdout, re.M)) == sorted([*TARGETS, *further])


def test_a_complete_environment_is_left_unchanged(venv: str) -> None:
    done = call("make", "ready", venv)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", ["PROMPT", "MODEL", "MODEL_DIR", "OUT", "ARGS", "VENDOR_LICENCE"])
@pytest.mark.parametrize("given", ["argument", "environment"])
def test_text_reaches_the_tasks_as_typed(name: str, given: str) -> None:
    show = ["make", "-s", f"--eval=show: ; @printenv {name}", "show"]
    done = call(*show, f"{name}={AWKWARD}") if given == "argument" else call(*show, said={name: AWKWARD})
    assert done.stdout == AWKWARD + "\n"


def test_an_unknown_model_lists_the_known_ones(venv: str) -> None:
    done = call("make", "build", venv, "MODEL=qwen2-0.5")
    assert done.returncode == 2
    assert done.stdout == ""
    first, _, failed = done.stderr.splitlines()
    known = ", ".join(sorted(path.stem for path in (ROOT / "models").glob("*.toml")))
    assert first.startswith(f"error: no model is named 'qwen2-0.5': models/ has {known}")
    assert "did you mean qwen2-0.5b?" in first
    assert failed.startswith("make:")


def test_a_malicious_model_name_is_quoted_and_not_executed(venv: str) -> None:
    done = call("make", "build", venv, f"MODEL={AWKWARD}")
    assert f"error: no model is named {AWKWARD!r}" in done.stderr


def test_run_before_build_names_the_build_command(venv: str, tmp_path: Path) -> None:
    done = call("make", "run", venv, f"OUT={tmp_path / 'no where'}")
    assert done.returncode == 2
    assert (
        f"error: there is no bundle {tmp_path / 'no where' / 'tiny-qwen2'} yet: make build MODEL=tiny-qwen2"
        in done.stderr
    )


def test_unbalanced_quotes_in_args_are_reported(venv: str) -> None:
    done = call("make", "test", venv, "ARGS=-k 'fetch")
    assert done.returncode == 2
    assert 'error: ARGS is "-k \'fetch": No closing quotation' in done.stderr


def python(path: Path, change: str) -> str:
    """This Python, modified by `change`."""
    code = f"import sys, runpy; {change}; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    return f'PYTHON={script(path, f"""exec "{sys.executable}" -c "{code}" "$@" """)}'


def test_a_python_that_is_too_old(tmp_path: Path) -> None:
    old = python(tmp_path / "python3.9", "sys.version_info = (3, 9, 2, 'final', 0)")
    done = call("make", "setup", old, f"VENV={tmp_path / 'venv'}")
    assert done.returncode == 2
    assert "is Python 3.9.2; 3.11 to 3.14 is needed" in done.stderr.splitlines()[0]
    assert "make PYTHON=python3." in done.stderr.splitlines()[1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "venv").exists()


def test_no_python_at_all() -> None:
    done = call("make", "setup", "PYTHON=python3.99")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: no python3.99 here: on Debian or Ubuntu, apt-get install python3 python3-venv"
    )


def test_a_python_without_ensurepip_names_the_package(tmp_path: Path) -> None:
    bare = python(tmp_path / "python3", "sys.modules['ensurepip'] = None")
    make = shutil.which("make")
    assert make
    done = call(make, "setup", bare, f"VENV={tmp_path / 'venv'}", said={"PATH": str(tmp_path / "no apt-get here")})
    assert done.returncode == 2
    assert "cannot make virtual environments: its ensurepip is missing" in done.stderr
    assert f"sudo apt-get install python3.{sys.version_info[1]}-venv" in done.stderr


def test_a_foreign_folder_is_not_made_an_environment(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    done = call("make", "setup", f"PYTHON={sys.executable}", f"VENV={tmp_path}")
    assert done.returncode == 2
    assert f"error: {tmp_path} is a folder of something else" in done.stderr
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("target", ["build", "test", "test-all"])
def test_only_the_tests_build_the_engine_themselves(target: str, venv: str) -> None:
    done = call("make", "--dry-run", target, venv)
    assert done.returncode == 0
    assert ("install.py --without-engine" in done.stdout) == target.startswith("test")


def test_clean_removes_only_build_outputs(tmp_path: Path, venv: str) -> None:
    checkout = tmp_path / "a checkout"
    for name in (
        "Makefile",
        "tasks.py",
        "requirements/install.py",
        "requirements/page.py",
        "board/axrun/__init__.py",
        "board/axrun/command.py",
        "board/axrun/errors.py",
        "ci/tasks/boards.py",
        "ci/tasks/common.py",
        "ci/tasks/nights.py",
        "ci/tasks/system_tests.py",
    ):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    for name in ("out/toy/manifest.json", ".mypy_cache/x", "board/axrun/__pycache__/errors.pyc", "mine/notes"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("")
    assert call("make", "clean", venv, cwd=checkout, said={"PYTHONDONTWRITEBYTECODE": "1"}).returncode == 0
    kept = ["Makefile", "board", "ci", "mine", "requirements", "tasks.py"]
    assert sorted(path.name for path in checkout.iterdir()) == kept
    assert sorted(path.name for path in (checkout / "board" / "axrun").iterdir()) == [
        "__init__.py",
        "command.py",
        "errors.py",
    ]


def test_test_all_names_missing_packages(venv: str, tmp_path: Path) -> None:
    """With a PATH that has only the programs needed to start make."""
    for name in ("make", "sh", "awk"):
        (tmp_path / "few" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "few" / name).symlink_to(shutil.which(name) or name)
    done = call("make", "test-all", venv, said={"PATH": str(tmp_path / "few")})
    assert done.returncode == 2
    lines = (ROOT / "requirements" / "system.apt").read_text().splitlines()
    listed = [line.split() for line in lines if not line.startswith("#")]
    packages = [package for needed, package in listed if not Path("/", needed).exists()]
    assert packages
    assert f"apt-get install {' '.join(packages)}" in done.stderr.splitlines()[0]

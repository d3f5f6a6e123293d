"""The groups of system tests: all run, failures are retried once, a second failure sets the exit code."""

from __future__ import annotations

from pathlib import Path

import pytest
from invoke.exceptions import Exit

from ci.tasks import system_tests

SETTINGS = "[pytest]\nmarkers = system\ntestpaths = tests\n"
PASSES = "import pytest\n@pytest.mark.system\ndef test_it():\n    open({mark!r}, 'a').write({name!r})\n"
FAILS_ONCE = PASSES + "    assert open({mark!r}).read().count({name!r}) > 1\n"
FAILS = PASSES + "    assert False\n"


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file to which every test appends a letter: a and b are groups, c and d belong to no group."""
    (tmp_path / "pytest.ini").write_text(SETTINGS)
    monkeypatch.setattr(system_tests, "ROOT", tmp_path)
    monkeypatch.setattr(system_tests, "FOLDERS", ("tests/a", "tests/b"))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    made = tmp_path / "mark"
    for name in "abcd":
        write(made, name, PASSES)
    return made


def write(mark: Path, name: str, text: str) -> None:
    file = mark.parent / "tests" / name / f"test_{name}.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text.format(mark=str(mark), name=name))


def test_groups_run_once_and_failed_tests_are_retried_alone(mark: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(mark, "b", FAILS_ONCE)
    write(mark, "c", FAILS_ONCE)
    system_tests.run()
    assert sorted(mark.read_text()) == ["a", "b", "b", "c", "c", "d"]
    said = capfd.readouterr().out
    assert "system tests of tests/a (" in said
    assert "system tests of tests/b failed. Retrying" in said
    assert "the other system tests failed. Retrying" in said


def test_a_test_that_fails_twice_sets_the_exit_code(mark: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(mark, "d", FAILS)
    with pytest.raises(Exit) as ended:
        system_tests.run()
    assert ended.value.code == 1
    assert mark.read_text().count("d") == 2
    assert "1 failed" in capfd.readouterr().out


def test_only_flags_may_leave_a_group_without_a_test(mark: Path) -> None:
    system_tests.run("-k", "test_b")
    assert mark.read_text() == "b"
    system_tests.run("-k", "nothing")
    write(mark, "b", "")
    with pytest.raises(Exit) as ended:
        system_tests.run()
    assert ended.value.code == 5

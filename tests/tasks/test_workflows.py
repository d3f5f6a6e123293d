"""The commands in the workflows and CONTRIBUTING.md exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks import namespace

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)) | {"ready"}
PINNED = re.compile(r"[\w-]+/[\w-]+@([0-9a-f]{40}|v\d+\.\d+\.\d+)")  # a commit, or a version in full


def steps(workflow: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def test_there_are_workflows_for_a_change_a_night_and_a_release() -> None:
    assert [path.stem for path in WORKFLOWS] == ["change", "nightly", "release"]


@pytest.mark.parametrize("path", [*WORKFLOWS, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_make_targets_and_tasks_of_workflows_exist(path: Path) -> None:
    text = path.read_text()
    wanted = set(re.findall(r"(?:^|[`\s])make ([a-z][a-z-]*)\b", text))
    tasks = {name.replace("_", "-") for name in namespace.task_names}
    assert wanted <= TARGETS
    assert set(re.findall(r"\binvoke ([a-z][a-z.-]*)", text)) <= tasks
    assert wanted


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_and_read_only(workflow: Path) -> None:
    used = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert used
    assert all(PINNED.fullmatch(name) for name in used)
    assert yaml.safe_load(workflow.read_text())["permissions"] == {"contents": "read"}


def test_no_expression_is_expanded_in_a_shell_command() -> None:
    """${{ ... }} may hold text of a pull request's author, so scripts read it from environment variables."""
    assert not [step["run"] for path in WORKFLOWS for step in steps(path) if "${{" in step.get("run", "")]


def test_hooks_run_the_linters_of_the_checkout() -> None:
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = {hook["id"]: hook["entry"].split()[0] for hook in local["hooks"]}
    assert entries == {
        "ruff-check": ".venv/bin/ruff",
        "ruff-format": ".venv/bin/ruff",
        "mypy": ".venv/bin/mypy",
    }

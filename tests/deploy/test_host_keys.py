"""Host keys are checked with any YAML, in labgrid too: a wrong key ends the connection."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from axrun.errors import BadInput
from ci.device import place
from ci.device.place import Board
from tests.deploy.conftest import ROOT, Place

pytestmark = pytest.mark.system
REACHED = "reached the board"


@pytest.fixture
def copied(host: Place, tmp_path: Path) -> Board:
    """A board with a copy of virtual.yaml, reached at this machine's sshd."""
    yaml = tmp_path / "desk" / "mine.yaml"
    yaml.parent.mkdir()
    text = (place.BOARDS / "virtual.yaml").read_text()
    yaml.write_text(text.replace("username: board", f"username: {host.at.user}"))
    return dataclasses.replace(place.find(str(yaml)), state=host.board.state, address=host.at.host)


def reach(board: Board) -> str:
    with place.target(board) as target:
        (said,) = target.get_driver("SSHDriver").run_check(f"echo {REACHED}")
    return str(said)


def swap_known_key(host: Place) -> None:
    """Replaces the board's key in known_hosts by another one."""
    public = (host.board.state / "id_ed25519.pub").read_text().rsplit(" ", 1)[0]
    (host.board.state / "known_hosts").write_text(f"[{host.at.host}]:{host.at.port} {public}\n")


def test_the_known_key_is_accepted(copied: Board) -> None:
    assert reach(copied) == REACHED


@pytest.mark.parametrize("tools", ["", "tools:\n  ssh: ssh\n", "tools: {}\n"])
def test_another_key_is_refused_through_labgrid(tools: str, copied: Board, host: Place) -> None:
    swap_known_key(host)
    copied.yaml.write_text(copied.yaml.read_text() + tools)
    with place.target(copied) as target:
        driver = target.get_driver("SSHDriver", activate=False)
        driver.connection_timeout = 1.0
        with pytest.raises(Exception, match=r"(?i)timeout while waiting for ssh connection"):
            target.activate(driver)


def test_an_unknown_key_fails_the_board_tests(copied: Board, host: Place) -> None:
    (host.board.state / "known_hosts").write_text("")
    copied.yaml.write_text(copied.yaml.read_text().replace("SSHDriver:", "SSHDriver:\n        connection_timeout: 1.0"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/hil", "-p", "no:cacheprovider", "--lg-env", str(copied.yaml)],
        cwd=ROOT,
        env={**os.environ, **copied.variables()},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert "virtual does not answer over SSH" in done.stdout


def test_ssh_settings_in_the_yaml_are_refused(copied: Board) -> None:
    copied.yaml.write_text(copied.yaml.read_text() + "tools:\n  ssh: /usr/bin/ssh\n")
    with pytest.raises(BadInput, match=r"mine\.yaml: tools\.ssh is '/usr/bin/ssh', which may accept any host key"):
        place.address(copied)
    copied.yaml.write_text(copied.yaml.read_text().replace("/usr/bin/ssh", str(place.SSH)))
    assert reach(copied) == REACHED

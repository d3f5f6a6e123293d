"""Refusals of a deploy: an error of one to three lines, and the old release stays current."""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from axrun.errors import BadInput, CheckFailed, Failure
from ci.device import connection, virtual_board
from ci.device.connection import Connection
from ci.device.deploy import Deployed, deploy
from ci.device.ssh import Lost
from ci.device.wheelhouse import Package
from tests.deploy.conftest import Place, host_package, sshd

pytestmark = pytest.mark.system


@pytest.fixture
def package(tmp_path: Path) -> Package:
    return host_package(tmp_path / "package")


@pytest.fixture
def bundle(bundles: tuple[Path, Path]) -> Path:
    return bundles[0]


def refusal(kind: type[Failure], place: Place, package: Package, bundle: Path) -> str:
    """The error message of a deploy that must fail."""
    with pytest.raises(kind) as caught:
        deploy(place.board, place.at, package, bundle, "1+1=")
    text = str(caught.value)
    assert len(text.splitlines()) <= 3
    assert caught.value.exit_code == (2 if kind is BadInput else 1)
    return text


def deployed(place: Place, package: Package, bundle: Path) -> Deployed:
    return deploy(place.board, place.at, package, bundle, "1+1=")


def test_a_board_without_power(host: Place, package: Package, bundle: Path) -> None:
    off = Place(host.board, dataclasses.replace(host.at, port=1))
    assert "does not answer at" in refusal(BadInput, off, package, bundle)


def test_a_changed_host_key(host: Place, package: Package, bundle: Path) -> None:
    known = host.board.state / "known_hosts"
    public = (host.board.state / "id_ed25519.pub").read_text().rsplit(" ", 1)[0]
    known.write_text(f"[{host.at.host}]:{host.at.port} {public}\n")
    text = refusal(BadInput, host, package, bundle)
    assert text.startswith(f"the host key of {host.at.user}@{host.at.host} port 2222 is not the one in {known}")


def test_an_unknown_host_key(host: Place, package: Package, bundle: Path) -> None:
    (host.board.state / "known_hosts").write_text("")
    text = refusal(BadInput, host, package, bundle)
    assert "Compare it with the board's own" in text
    added = text.splitlines()[-1]
    assert added.startswith("ssh-keyscan")
    subprocess.run(["sh", "-c", added], check=True, capture_output=True)
    deployed(host, package, bundle)


def test_a_client_key_that_the_board_refuses(host: Place, package: Package, bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other)], check=True)
    stranger = Place(host.board, dataclasses.replace(host.at, keyfile=other))
    assert f"does not accept the key {other}\n" in refusal(BadInput, stranger, package, bundle)


def test_another_architecture(host: Place, package: Package, bundle: Path) -> None:
    board = dataclasses.replace(host.board, architecture="riscv64")
    text = refusal(BadInput, Place(board, host.at), package, bundle)
    assert f"has the architecture '{platform.machine()}', expected riscv64" in text
    assert not host.root.exists()


def test_another_python_version(host: Place, package: Package, bundle: Path) -> None:
    board = dataclasses.replace(host.board, python="3.99")
    text = refusal(BadInput, Place(board, host.at), package, bundle)
    assert "its settings say 3.99\nSet it: python = " in text


def test_no_python(virtual: Place, package: Package, bundle: Path) -> None:
    python = virtual.board.state / "rootfs" / "usr" / "bin" / "python3"
    hidden = python.with_name("hidden")
    python.rename(hidden)
    try:
        assert "has no python3; 3.9 or newer is needed" in refusal(BadInput, virtual, package, bundle)
    finally:
        hidden.rename(python)


def test_a_folder_that_cannot_be_written(virtual: Place, package: Package, bundle: Path) -> None:
    board = dataclasses.replace(virtual.board, root="/usr/lib/axrun")
    assert "'/usr/lib/axrun' on virtual cannot be written" in refusal(
        BadInput, Place(board, virtual.at), package, bundle
    )


def test_too_little_memory(host: Place, package: Package, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundle seems to need more memory than any machine has."""
    from axrun.memory import Needs

    monkeypatch.setattr("ci.device.deploy.needs", lambda bundle, engine: Needs(1 << 50, 0, 0))
    assert "MB of memory, host has" in refusal(BadInput, host, package, bundle)


def test_a_board_locked_by_another_deploy(host: Place, package: Package, bundle: Path) -> None:
    with Connection(host.board, host.at) as other:
        other.call("lock", owner="mary@laptop (pid 7)")
        text = refusal(BadInput, host, package, bundle)
        assert text.startswith("'mary@laptop (pid 7)' is deploying to host")
    deployed(host, package, bundle)


def test_a_disk_that_is_too_small(virtual: Place, aarch64: Package, bundle: Path) -> None:
    """Found before the transfer; if the disk fills up during the transfer, the transferred files are removed."""
    small = dataclasses.replace(virtual.board, root="small")
    virtual_board.down(virtual.board)
    virtual_board.up(small, virtual.at, disk="16M")
    try:
        text = refusal(BadInput, Place(small, virtual.at), aarch64, bundle)
        assert text.startswith("the disk of virtual has ")
        assert text.splitlines()[0].endswith(f"the package needs {(aarch64.listing.size + (8 << 20)) >> 20} MB")
        with Connection(small, virtual.at) as link:
            found = link.call("survey", store="packages", name="0" * 16, listing=[])
            with pytest.raises(BadInput, match="the disk of virtual became full during the transfer of site"):
                link.send(aarch64.site, found["into"], None)
            link.call("drop")
            assert link.call("facts")["free"] > 15 << 20
    finally:
        virtual_board.down(small)
        virtual_board.up(virtual.board, virtual.at)


def test_a_runner_that_fails(host: Place, package: Package, bundle: Path, tmp_path: Path) -> None:
    good = deployed(host, package, bundle)
    broken = host_package(tmp_path / "broken", launcher="#!/bin/sh\necho 'error: no engine here' >&2\nexit 1\n")
    text = refusal(CheckFailed, host, broken, bundle)
    assert text.endswith("does not run on host: error: no engine here\nThe previous release stays current.")
    assert (host.root / "current").resolve().name == good.release


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"text": "3", "tokens": [19]}', "host answers '1+1=' with tokens [19], expected ["),
        ("hello", "answers 'hello\\n'"),
        ('{"text": "3", "tokens": {"a": 1}}', "answers '{"),
    ],
)
def test_a_runner_with_a_wrong_answer(
    host: Place, package: Package, bundle: Path, tmp_path: Path, answer: str, expected: str
) -> None:
    good = deployed(host, package, bundle)
    wrong = host_package(tmp_path / "wrong", launcher=f"#!/bin/sh\necho '{answer}'\n")
    assert expected in refusal(CheckFailed, host, wrong, bundle)
    assert (host.root / "current").resolve().name == good.release


def test_a_runner_that_hangs(
    host: Place, package: Package, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = deployed(host, package, bundle)
    monkeypatch.setattr("ci.device.deploy.SMOKE_SECONDS", 2)
    sleeps = f"sleep 1000.{os.getpid()}"  # unique to this test run
    slow = host_package(tmp_path / "slow", launcher=f"#!/bin/sh\nexec {sleeps}\n")
    assert "did not answer in 2 s on host" in refusal(CheckFailed, host, slow, bundle)
    assert (host.root / "current").resolve().name == good.release
    listed = subprocess.run(["ps", "ax", "-o", "args"], capture_output=True, text=True, check=True)
    assert sleeps not in listed.stdout.splitlines()


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("echo Welcome to this board", "answered start with b'Welcome to this board'"),
        ("yes 1234567890123456789012345678901234567890 | tr -d '\\n'", "answered start with more than 4 MB"),
        ('echo "[1]"', "answered start with b'[1]'"),
        ("sleep 1000", "did not answer start in 10 s"),
        ("exit 3", "was lost during start: it printed nothing (exit code 3)"),
        (
            """sh -c 'echo "{\\"ok\\": 1}"; echo "{\\"ok\\": {\\"architecture\\": []}}"; cat >/dev/null'""",
            "which is not a valid answer",
        ),
    ],
)
def test_a_board_with_invalid_replies(
    tmp_path: Path, package: Package, bundle: Path, monkeypatch: pytest.MonkeyPatch, command: str, expected: str
) -> None:
    if command.startswith("sleep"):
        monkeypatch.setattr(connection, "CONNECT_SECONDS", 9)
        monkeypatch.setattr(connection, "REQUEST_SECONDS", 1)
    with sshd(tmp_path / "strange", [f"ForceCommand {command}"]) as strange, pytest.raises(Lost) as caught:
        deploy(strange.board, strange.at, package, bundle, "1+1=")
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_damaged_local_bundle(host: Place, package: Package, bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    with (copy / "qwen2_post.axmodel").open("r+b") as file:
        file.seek(5000)
        file.write(b"!")
    assert "is not what was built" in refusal(CheckFailed, host, package, copy)
    assert not host.root.exists()

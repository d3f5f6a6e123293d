"""Boards to deploy to: the emulated board, or this machine's sshd if emulation would only cost time."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from ci.device import place, virtual_board
from ci.device.listing import Listing
from ci.device.place import Address, Board
from ci.device.wheelhouse import Package
from tests import shared
from tests.conftest import Builder

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = f"""#!/bin/sh
PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$(dirname "$(dirname "$(readlink -f "$0")")")" exec {sys.executable} -m axrun "$@"
"""


@dataclass(frozen=True)
class Place:
    """A running board and its address."""

    board: Board
    at: Address

    @property
    def root(self) -> Path:
        """The path of its releases folder on this machine."""
        inside = Path(self.board.root)
        return inside if inside.is_absolute() else self.board.state / "rootfs" / "home" / "board" / inside


def loopback() -> str:
    """A loopback address that no other test run uses."""
    for last in range(1, 255):
        address = f"127.{66 + os.getpid() % 64}.{os.getpid() // 64 % 250 + 1}.{last}"
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((address, 2222))
                return address
    raise AssertionError("no loopback address is free")


@pytest.fixture(scope="session")
def virtual(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The emulated board, running, with its own disk and keys."""
    state = tmp_path_factory.mktemp("virtual")
    board = dataclasses.replace(place.find("virtual"), state=state, address=loopback())
    at = place.address(board)
    virtual_board.up(board, at)
    yield Place(board, at)
    virtual_board.down(board)
    shutil.rmtree(state)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Place]:
    """This machine as a board: host architecture and Python, behind a real sshd with strict host keys."""
    with sshd(tmp_path / "host") as found:
        yield found


@contextlib.contextmanager
def sshd(folder: Path, options: Sequence[str] = ()) -> Iterator[Place]:
    """An sshd on loopback that accepts this user; `options` precede its default options."""
    folder.mkdir(mode=0o700)
    for name in ("host_key", "id_ed25519"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    at = Address(loopback(), 2222, place.owner().partition("@")[0], folder / "id_ed25519")
    public = (folder / "host_key.pub").read_text().rsplit(" ", 1)[0]
    (folder / "known_hosts").write_text(f"[{at.host}]:{at.port} {public}\n")
    lines = [
        *options,
        f"ListenAddress {at.host}",
        f"Port {at.port}",
        f"HostKey {folder / 'host_key'}",
        f"AuthorizedKeysFile {folder / 'id_ed25519.pub'}",
        *("StrictModes no", "PasswordAuthentication no", "PermitRootLogin yes", "UsePAM no", "PidFile none"),
        *("MaxStartups 64", "UseDNS no"),
    ]
    (folder / "sshd_config").write_text("".join(f"{line}\n" for line in lines))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    assert program, "apt-get install openssh-server"
    with (folder / "sshd.log").open("wb") as log:
        server = subprocess.Popen([program, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log)
    try:
        wait_for(at, server)
        version = subprocess.run(
            ["python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
            capture_output=True,
            text=True,
            check=True,
            env={"PATH": "/usr/local/bin:/usr/bin:/bin"},
        )
        yield Place(
            Board("host", place.BOARDS / "virtual.yaml", folder, platform.machine(), version.stdout.strip(),
                  str(folder / "axrun"), "ort"),
            at,
        )  # fmt: skip
    finally:
        server.terminate()
        server.wait(timeout=60)


def wait_for(at: Address, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert server.poll() is None, "sshd ended"
        with contextlib.suppress(OSError), socket.create_connection((at.host, at.port), timeout=5) as link:
            if link.recv(4) == b"SSH-":
                return
        time.sleep(0.05)
    raise AssertionError("sshd does not answer")


@pytest.fixture(scope="session")
def aarch64() -> Package:
    """The real board package, made by `invoke cross`."""
    return shared.board_package(place.find("virtual").python)


def host_package(folder: Path, ballast: bytes = b"", launcher: str = LAUNCHER) -> Package:
    """A runner package for this machine, without wheels; `ballast` makes it larger and changes its digest."""
    site = folder / "site"
    shutil.copytree(ROOT / "board" / "axrun", site / "axrun", ignore=shutil.ignore_patterns("__pycache__"))
    (site / "bin").mkdir()
    (site / "bin" / "axrun").write_text(launcher)
    (site / "bin" / "axrun").chmod(0o755)
    (site / "ballast").write_bytes(ballast)
    return Package(folder, "", Listing.of(site))


@pytest.fixture(scope="session")
def bundles(build_tiny: Builder) -> tuple[Path, Path]:
    """Two different bundles of the shipped model."""
    return build_tiny(), build_tiny(kv_cache_len=191)

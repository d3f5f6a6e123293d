"""Connects to the Docker daemon, and starts a private one for tests and CI (as root)."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import docker
from docker.errors import DockerException

from axrun.errors import BadInput

START_SECONDS = 180.0  # a daemon on a busy machine
STOP_SECONDS = 60.0
CALL_SECONDS = 1800  # timeout of a call: loading an image on a slow disk takes long
# No bridge, no packet filter: containers have the host's network or none.
WITHOUT_NETWORK = ("--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false")


def connect(host: str | None = None) -> docker.DockerClient:
    """A client of the daemon at `host`, by default that of DOCKER_HOST or the default socket. Raises BadInput."""
    try:
        client = docker.DockerClient(host, timeout=CALL_SECONDS) if host else docker.from_env(timeout=CALL_SECONDS)
        client.ping()
    except (DockerException, OSError, ValueError) as error:
        place = host or os.environ.get("DOCKER_HOST") or "the default socket"
        raise BadInput(
            f"no Docker daemon answers at {place}: {cause(error)}\n"
            "Start one (Debian: apt-get install docker.io), set DOCKER_HOST, or build without it: ENGINE=local."
        ) from None
    return client


def cause(error: BaseException) -> str:
    """The innermost cause of an exception in one line, for example `No such file or directory`."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200]


def is_local(client: docker.DockerClient) -> bool:
    """Whether its containers can mount this machine's folders: only with a Unix socket."""
    return str(client.api.base_url).startswith("http+docker://")


@contextlib.contextmanager
def own_daemon(folder: Path) -> Iterator[str]:
    """A daemon that keeps everything in `folder` and ends with the block; yields its address for DOCKER_HOST.

    Raises BadInput if it cannot be started: not root, no dockerd, or the last line of its log.
    """
    program = shutil.which("dockerd") or shutil.which("dockerd", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        raise BadInput("dockerd is not installed\nOn Debian or Ubuntu: apt-get install docker.io")
    if os.geteuid() != 0:
        raise BadInput("only root can start dockerd\nStart the system's daemon, or join the group docker.")
    folder.mkdir(parents=True, exist_ok=True)
    address, log = f"unix://{folder / 'docker.sock'}", folder / "dockerd.log"
    places = [f"--data-root={folder / 'data'}", f"--exec-root={folder / 'exec'}", f"--pidfile={folder / 'pid'}"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [program, f"--host={address}", *places, *WITHOUT_NETWORK],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,  # Ctrl-C is not for it
        )
    try:
        _wait_until_it_answers(process, address, log)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _unmount(folder)


def _wait_until_it_answers(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        ended = process.poll() is not None
        try:
            connect(address).close()
            return
        except BadInput:
            if ended or time.monotonic() > deadline:
                lines = log.read_text("utf-8", errors="replace").splitlines()
                raise BadInput(f"dockerd did not start: {' '.join(lines[-1:])[:400]}\nIts log is {log}.") from None
        time.sleep(0.2)


def _unmount(folder: Path) -> None:
    """Unmounts what the daemon left under `folder`, innermost first, so that the folder can be removed."""
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for mount in sorted((m for m in mounts if m.startswith(f"{folder.resolve()}/")), reverse=True):
        subprocess.run(["umount", "--lazy", mount], check=False)

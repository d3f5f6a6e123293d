"""The Docker daemon that answers, and one of our own where none does (for tests and CI, as root)."""

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
CALL_SECONDS = 1800  # the longest silence of one call: loading an image on a slow disk
# No address, no bridge, no packet filter: containers have the host's network or none.
WITHOUT_NETWORK = ("--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false")


def connect(host: str | None = None) -> docker.DockerClient:
    """A client of the daemon at `host`, by default of DOCKER_HOST's or the usual socket. Raises BadInput."""
    try:
        client = docker.DockerClient(host, timeout=CALL_SECONDS) if host else docker.from_env(timeout=CALL_SECONDS)
        client.ping()
    except (DockerException, OSError, ValueError) as error:
        place = host or os.environ.get("DOCKER_HOST") or "the usual socket"
        raise BadInput(
            f"no Docker daemon answers at {place}: {cause(error)}\n"
            "Start one (Debian: apt-get install docker.io), name it in DOCKER_HOST, or do without: ENGINE=local."
        ) from None
    return client


def cause(error: BaseException) -> str:
    """The innermost reason of a chain of them, in one line: `No such file or directory`."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200]


def is_local(client: docker.DockerClient) -> bool:
    """Whether its containers can see this machine's folders: true of a Unix socket only."""
    return str(client.api.base_url).startswith("http+docker://")


@contextlib.contextmanager
def own_daemon(folder: Path) -> Iterator[str]:
    """A daemon that keeps everything in `folder`, ended when the block ends; gives its address for DOCKER_HOST.

    Raises BadInput when it cannot be started: not root, no dockerd, or what dockerd's log says last.
    """
    program = shutil.which("dockerd") or shutil.which("dockerd", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        raise BadInput("there is no dockerd here\nOn Debian or Ubuntu: apt-get install docker.io")
    if os.geteuid() != 0:
        raise BadInput("only root can start dockerd\nStart the machine's own, or join the group docker.")
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
    """What the daemon left mounted under `folder`, innermost first, so that the folder can be removed."""
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for mount in sorted((m for m in mounts if m.startswith(f"{folder.resolve()}/")), reverse=True):
        subprocess.run(["umount", "--lazy", mount], check=False)

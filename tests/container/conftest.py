"""One Docker daemon and one image for all `system` tests: the machine's daemon, or a private one."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from axrun.errors import BadInput
from ci.container import image
from ci.container.daemon import connect, own_daemon

ROOT = Path(__file__).resolve().parents[2]


def invoke(*words: str, **said: str) -> subprocess.CompletedProcess[str]:
    """Runs a task in a subprocess, as a user does; `said` are environment variables."""
    return subprocess.run(
        [sys.executable, "-m", "invoke", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **said},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=1800,
    )


@pytest.fixture(scope="session")
def client() -> Iterator[docker.DockerClient]:
    """A client of the daemon; DOCKER_HOST is set for subprocesses of tests."""
    try:
        found = connect()
    except BadInput:
        folder = Path(tempfile.mkdtemp(prefix="axc-docker-"))  # not in pytest's tmp_path, which is kept for three runs
        try:
            with own_daemon(folder) as address, pytest.MonkeyPatch.context() as patch:
                patch.setenv("DOCKER_HOST", address)
                with contextlib.closing(connect()) as ours:
                    yield ours
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return
    with contextlib.closing(found):
        yield found


@pytest.fixture(scope="session")
def verified(client: docker.DockerClient) -> subprocess.CompletedProcess[str]:
    """Runs `invoke verify-reproducible`, which leaves its image in the daemon."""
    return invoke("verify-reproducible")


@pytest.fixture(scope="session")
def axc(client: docker.DockerClient, verified: subprocess.CompletedProcess[str]) -> str:
    """The name of the image."""
    assert image.is_current(client), verified.stdout + verified.stderr
    return image.TAG

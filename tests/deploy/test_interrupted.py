"""A deploy that is killed at any point leaves a complete release and no lock."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ci.device.listing import Listing
from tests.deploy.conftest import ROOT, Place, host_package

pytestmark = pytest.mark.system
KILLS = 50
SPARED = 7  # one of this many deploys is not killed


def start(place: Place, package: Path, bundle: Path) -> subprocess.Popen[str]:
    given = {
        "yaml": str(place.board.yaml),
        "state": str(place.board.state),
        "architecture": place.board.architecture,
        "python": place.board.python,
        "root": place.board.root,
        "host": place.at.host,
        "port": str(place.at.port),
        "user": place.at.user,
        "keyfile": str(place.at.keyfile),
        "package": str(package),
        "bundle": str(bundle),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "tests.deploy.deployer", json.dumps(given)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_at_fifty_random_points(host: Place, bundles: tuple[Path, Path], tmp_path: Path) -> None:
    random.seed(5)
    versions = []
    for index, bundle in enumerate(bundles):
        package = host_package(tmp_path / f"package{index}", ballast=random.randbytes(8 << 20))
        versions.append((package.folder, bundle, (package.listing.id, Listing.of(bundle).id)))
    whole = {identity for _, _, identity in versions}

    began = time.monotonic()
    first = start(host, *versions[0][:2])
    assert first.wait(timeout=600) == 0, first.communicate()
    seconds = time.monotonic() - began

    current = host.root / "current"
    seen = set()
    ended = 0
    for kill in range(KILLS):
        began = time.monotonic()
        deploying = start(host, *versions[(kill + 1) % 2][:2])
        spared = kill % SPARED == SPARED - 1
        try:
            _, said = deploying.communicate(timeout=600 if spared else random.uniform(0, 1.1 * seconds))
            assert deploying.returncode == 0, said
            ended += 1
            seconds = time.monotonic() - began  # adapts the kill times to the machine's current speed
        except subprocess.TimeoutExpired:
            deploying.send_signal(signal.SIGKILL)
            deploying.communicate(timeout=60)
        there = tuple(Listing.of((current / part).resolve()).id for part in ("package", "model"))
        assert there in whole, f"after kill {kill}, {os.readlink(current)} holds {there}"
        seen.add(there)
    assert seen == whole
    assert 0 < ended < KILLS

    for folder, bundle, identity in versions:
        last = start(host, folder, bundle)
        out, said = last.communicate(timeout=600)
        assert last.returncode == 0, said
        assert "answers '1+1=' with '2'" in out
        assert tuple(path.name for path in (host.root / "models").glob("*[0-9a-f]") if path.is_dir()) == identity[1:]
    assert not (host.root / "incoming").exists()

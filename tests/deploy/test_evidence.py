"""A deploy record compared with the board, through a real sshd."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from ci.device import evidence
from ci.device.connection import Connection
from ci.device.deploy import deploy
from tests.deploy.conftest import Place, host_package

pytestmark = pytest.mark.system


def inventory(host: Place, record: evidence.Record) -> dict[str, Any]:
    with Connection(host.board, host.at) as link:
        link.call("forget_compiled", package=record.package)
        return dict(link.call("inventory", release=record.release, package=record.package, model=record.model))


def test_a_deploy_is_recorded_and_differences_are_found(
    host: Place, bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    file = tmp_path / "deployed.json"
    package = host_package(tmp_path / "package")
    older = deploy(host.board, host.at, package, bundles[1], "1+1=", record=file)
    assert evidence.compare(evidence.read(file), inventory(host, evidence.read(file))) == []
    done = deploy(host.board, host.at, package, bundles[0], "1+1=", record=file)
    record = evidence.read(file)
    assert (record.board, record.release, record.package) == ("host", done.release, package.listing.id)
    assert record.manifest_sha256 == hashlib.sha256((bundles[0] / "manifest.json").read_bytes()).hexdigest()
    compiled = host.root / "packages" / f"{record.package}.compiled"
    compiled.mkdir()
    assert evidence.compare(record, inventory(host, record)) == []
    assert not compiled.exists()

    current = host.root / "current"
    current.unlink()
    current.symlink_to(f"releases/{older.release}")
    (host.root / "models" / record.model / "hf" / "tokenizer.json").write_text("{}")
    assert evidence.compare(record, inventory(host, record)) == [
        f"current points at releases/{older.release}, deployed was releases/{record.release}",
        f"models/{record.model}/hf/tokenizer.json has other bytes than were deployed (sha256 44136fa355b3, deployed "
        f"{record.model_files['hf/tokenizer.json'][:12]})",
    ]
    deploy(host.board, host.at, package, bundles[0], "1+1=", record=file)
    assert evidence.compare(record, inventory(host, record)) == []


def test_a_refused_deploy_records_nothing(host: Place, bundles: tuple[Path, Path], tmp_path: Path) -> None:
    broken = host_package(tmp_path / "broken", launcher="#!/bin/sh\nexit 1\n")
    with pytest.raises(Exception, match="does not run on host"):
        deploy(host.board, host.at, broken, bundles[0], "1+1=", record=tmp_path / "deployed.json")
    assert not (tmp_path / "deployed.json").exists()

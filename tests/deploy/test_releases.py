"""The board after several deploys: small transfers, releases kept and removed, rollback."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from axrun.errors import BadInput
from ci.device.connection import Connection
from ci.device.deploy import deploy, rollback
from ci.device.listing import Listing
from tests.deploy.conftest import Place, host_package

pytestmark = pytest.mark.system


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir()}


def test_rollback_twice_then_deploy(host: Place, bundles: tuple[Path, Path], tmp_path: Path) -> None:
    packages = [host_package(tmp_path / f"package{index}", ballast=bytes([index])) for index in range(4)]
    done = [deploy(host.board, host.at, package, bundles[0], "1+1=") for package in packages[:3]]
    assert [each.was for each in done] == [None, done[0].release, done[1].release]
    assert names(host.root / "releases") == {each.release for each in done}

    assert rollback(host.board, host.at).release == done[1].release
    assert rollback(host.board, host.at).release == done[0].release
    with pytest.raises(BadInput, match=f"no release before {done[0].release}"):
        rollback(host.board, host.at)
    last = deploy(host.board, host.at, packages[3], bundles[0], "1+1=")
    assert (host.root / "current").resolve().name == last.release
    assert names(host.root / "releases") == {done[0].release, last.release}
    assert rollback(host.board, host.at).release == done[0].release


def test_deploying_the_same_again_transfers_nothing(host: Place, bundles: tuple[Path, Path], tmp_path: Path) -> None:
    package = host_package(tmp_path / "package")
    first = deploy(host.board, host.at, package, bundles[0], "1+1=")
    second = deploy(host.board, host.at, package, bundles[0], "1+1=")
    assert (second.release, second.was, second.wire) == (first.release, first.release, 0)
    assert first.wire > second.size / 2


def test_old_releases_are_removed_with_their_unused_files(
    host: Place, bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    package = host_package(tmp_path / "package")
    other = host_package(tmp_path / "other", ballast=b"other")
    for bundle in bundles:
        deploy(host.board, host.at, package, bundle, "1+1=", keep=1)
    assert names(host.root / "packages") == {package.listing.id}
    assert names(host.root / "models") == {Listing.of(bundles[1]).id}
    deploy(host.board, host.at, other, bundles[1], "1+1=", keep=2)
    assert names(host.root / "packages") == {package.listing.id, other.listing.id}
    assert len(names(host.root / "releases")) == 2


def test_damaged_files_on_the_board_are_repaired(host: Place, bundles: tuple[Path, Path], tmp_path: Path) -> None:
    package = host_package(tmp_path / "package")
    deploy(host.board, host.at, package, bundles[0], "1+1=")
    model = (host.root / "current" / "model").resolve()
    with (model / "qwen2_post.axmodel").open("r+b") as file:
        file.seek(3000)
        file.write(b"rot")
    (model / "stray").write_text("what does this do here")
    deploy(host.board, host.at, package, bundles[0], "1+1=")
    assert Listing.of(model) == Listing.of(bundles[0])


def test_a_large_bundle_is_transferred_once(host: Place, tmp_path: Path) -> None:
    """Files of the size of Qwen2-0.5B's; a second release of the same files transfers less than 1 % of them."""
    sizes = {f"qwen2_p128_l{layer}_together.axmodel": 15_000_000 for layer in range(24)}
    sizes |= {"qwen2_post.axmodel": 137_000_000, "model.embed_tokens.weight.bfloat16.bin": 272_269_312}
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    source = random.Random(5)
    for name, size in sizes.items():
        with (bundle / name).open("wb") as file:
            for left in range(size, 0, -(1 << 20)):
                file.write(source.randbytes(min(left, 1 << 20)))
    wire = []
    with Connection(host.board, host.at) as link:
        link.call("lock", owner="test")
        for release in ("1" * 16, "2" * 16):
            (bundle / "manifest.json").write_text(f'{{"tools": "{release}"}}')
            listing = Listing.of(bundle)
            place = {"store": "models", "name": listing.id, "listing": [list(entry) for entry in listing.files]}
            found = link.call("survey", 600, **place)
            moved = link.send(bundle, found["into"], found["like"])
            assert link.call("verify", 600, **place) == []
            link.call("keep", 600, **place)
            (host.root / "packages" / listing.id).mkdir(parents=True)
            link.call("assemble", name=release, release={"package": listing.id, "model": listing.id})
            link.call("switch", name=release)
            wire.append(moved.wire)
    total = sum(sizes.values())
    assert wire[0] > total
    assert wire[1] < total / 100
    first, second = (host.root / "models" / name for name in sorted(names(host.root / "models")))
    assert all(os.path.samefile(first / name, second / name) for name in sizes)

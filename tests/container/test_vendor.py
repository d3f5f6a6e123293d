"""BACKEND=pulsar2 from the command line to the bundle, with a stand-in for the vendor's image."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import docker
import pytest

from axrun.format.bundle import sha256, verify
from ci.container.wheels import download
from requirements.install import LOCKS
from tests.container.conftest import ROOT, invoke

pytestmark = pytest.mark.system
STAND_IN = ROOT / "tests" / "stand_in" / "pulsar2"
IMPORTS = ("onnx", "ml-dtypes")  # imported by the stand-in, not in our image


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Python packages for the stand-in."""
    wheels, folder = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("vendor") / "site"
    download(wheels, Path(sys.prefix), LOCKS / "test.txt", only=IMPORTS)
    for wheel in wheels.iterdir():
        with zipfile.ZipFile(wheel) as content:
            content.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def stand_in(client: docker.DockerClient, axc: str, site: Path) -> Iterator[Callable[..., str]]:
    """Builds an image of the stand-in and returns its id; environment variables select its behaviour."""
    made = []

    def make(**variables: str) -> str:
        settings = "".join(f"ENV {name}={value}\n" for name, value in {"PYTHONPATH": "/site", **variables}.items())
        dockerfile = f"FROM {axc}\nCOPY site /site\nCOPY pulsar2 /usr/local/bin/pulsar2\n{settings}".encode()
        context = io.BytesIO()
        with tarfile.open(fileobj=context, mode="w") as tar:
            entry = tarfile.TarInfo("Dockerfile")
            entry.size = len(dockerfile)
            tar.addfile(entry, io.BytesIO(dockerfile))
            tar.add(STAND_IN, "pulsar2")
            tar.add(site, "site")
        context.seek(0)
        image, _ = client.images.build(fileobj=context, custom_context=True, network_mode="none", rm=True)
        made.append(str(image.id))
        return str(image.id)

    yield make
    for identity in reversed(made):  # removing an image also removes its untagged parents
        with contextlib.suppress(docker.errors.ImageNotFound):
            client.images.remove(identity, force=True)


def test_an_image_given_by_id_builds_a_complete_bundle(stand_in: Callable[..., str], tmp_path: Path) -> None:
    identity = stand_in()
    done = invoke("build", "--backend", "pulsar2", "--out", str(tmp_path), VENDOR_IMAGE=identity)
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = verify(tmp_path / "tiny-qwen2")
    assert manifest["maker"] == "pulsar2"
    assert manifest["tools"]["image"] == identity
    assert manifest["tools"]["producer"].startswith("Pulsar2 stand-in")
    assert "building llm decode layer 4/4" in done.stdout
    assert "both runs gave identical files" in done.stdout
    assert done.stdout.splitlines()[-1] == "it runs on a board with an NPU"


def test_a_tarball_is_verified_by_digest(
    client: docker.DockerClient, stand_in: Callable[..., str], tmp_path: Path
) -> None:
    tarball, out = tmp_path / "vendor.tar", tmp_path / "out"
    with tarball.open("wb") as file:
        file.writelines(client.images.get(stand_in(WITH="llm_build2")).save(chunk_size=1 << 20, named=False))
    for digest, code, said in (
        ("", 2, "error: VENDOR_SHA256 is ''; expected the 64 hex digits of sha256sum"),
        ("0" * 64, 2, f"error: {tarball} has sha256 {sha256(tarball)}, expected 0000"),
        (sha256(tarball), 0, ""),
    ):
        done = invoke(
            "build", "--backend", "pulsar2", "--out", str(out), VENDOR_IMAGE=str(tarball), VENDOR_SHA256=digest
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert done.stderr.startswith(said)
        assert (out / "tiny-qwen2").exists() == (code == 0)
    groups = json.loads((out / "tiny-qwen2" / "manifest.json").read_text())["model"]["groups"]
    assert [group["history"] for group in groups] == [255, 0, 64, 128, 192]


def test_the_licence_is_mounted_where_the_image_expects_it(stand_in: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "key").write_text("good")
    said = {"VENDOR_IMAGE": stand_in(FAULT="licence")}
    words = ["build", "--backend", "pulsar2", "--out", str(tmp_path / "out")]
    without = invoke(*words, **said)
    assert without.returncode == 1
    assert "license check failed" in without.stderr
    assert "error: pulsar2 llm_build ended with exit code 3" in without.stderr
    assert not (tmp_path / "out" / "tiny-qwen2").exists()
    done = invoke(*words, **said, VENDOR_LICENCE=f"{tmp_path / 'mine'}:/licence")
    assert done.returncode == 0, done.stderr


def test_another_image_is_refused(axc: str, tmp_path: Path) -> None:
    words = ["build", "--backend", "pulsar2", "--out", str(tmp_path / "out")]
    for named, said in (
        ("", "error: BACKEND=pulsar2 needs the vendor's image, which we may not distribute"),
        ("pulsar2:5.2", "error: 'pulsar2:5.2' is neither an image in Docker nor a file"),
        (axc, "error: `pulsar2 version` fails in axc:latest: "),
    ):
        done = invoke(*words, VENDOR_IMAGE=named)
        assert (done.returncode, done.stderr.startswith(said)) == (2, True), done.stderr

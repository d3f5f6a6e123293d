"""The vendor's compiler in an image named by the user: an id, a name, or the vendor's tarball."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import docker
from docker.errors import APIError, ContainerError, ImageNotFound

from axrun.command import INTERRUPTED
from axrun.errors import BadInput
from axrun.format.bundle import sha256
from ci.container import engine
from ci.container.daemon import cause

PROGRAM = "pulsar2"
ENVIRONMENT = {"HOME": "/tmp", "FLOAT_MATMUL_USE_CONV_EU": "1"}  # the second is from the vendor's guides
MAX_VERSION = 200  # characters of its version text


@dataclass(frozen=True)
class Vendor:
    """An `axc.pulsar2.Compiler`. `licence` maps a folder of this machine to one in the container."""

    client: docker.DockerClient
    identity: str
    version: str
    licence: Mapping[Path, Path] = field(default_factory=dict)

    def has(self, command: str) -> bool:
        return _ask(self.client, self.identity, [PROGRAM, command, "--help"])[0] == 0

    def run(self, arguments: Sequence[str], reads: Path, writes: Path) -> int:
        reads, writes = reads.absolute(), writes.absolute()
        code = engine.run(
            self.client,
            self.identity,
            [PROGRAM, *arguments],
            reads={reads: reads, **self.licence},
            writes={writes: writes},
            folder=writes,
            environment=ENVIRONMENT,
        )
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        return code


def find(client: docker.DockerClient, named: str, digest: str, licence: str) -> Vendor:
    """The image `named`; a tarball must have the sha256 `digest` and is loaded first.

    `licence` is empty, a folder, or `folder:/path/in/the/image`. Raises BadInput.
    """
    if not named:
        raise BadInput(
            "BACKEND=pulsar2 needs the vendor's image, which we may not distribute\n"
            "Name it: VENDOR_IMAGE=id-or-name, or VENDOR_IMAGE=file.tar VENDOR_SHA256=... for the vendor's tarball."
        )
    identity = _load(client, Path(named), digest) if Path(named).is_file() else _known(client, named)
    code, said = _ask(client, identity, [PROGRAM, "version"])
    if code:
        raise BadInput(f"`{PROGRAM} version` fails in {named}: {said[-200:]}\nIs it the vendor's image?")
    version = re.search(r"version:?\s*(\S+)", said, re.IGNORECASE)
    return Vendor(client, identity, (version[1] if version else said)[:MAX_VERSION], _licence(licence))


def _licence(said: str) -> dict[Path, Path]:
    if not said:
        return {}
    here, _, there = said.partition(":")
    folder = Path(here).expanduser().absolute()
    if not folder.is_dir() or (there and not there.startswith("/")):
        raise BadInput(f"VENDOR_LICENCE is {said!r}; expected a folder, or folder:/where/the/image/expects/it")
    return {folder: Path(there or folder)}


def _known(client: docker.DockerClient, named: str) -> str:
    try:
        return str(client.images.get(named).id)
    except (ImageNotFound, APIError):
        raise BadInput(
            f"{named!r} is neither an image in Docker nor a file\nList the images: docker image ls"
        ) from None


def _load(client: docker.DockerClient, tarball: Path, digest: str) -> str:
    """Verifies and loads a tarball; returns the id of its only image."""
    if len(digest) != 64 or set(digest) - set(string.hexdigits):
        raise BadInput(f"VENDOR_SHA256 is {digest!r}; expected the 64 hex digits of sha256sum {tarball}")
    if (seen := sha256(tarball)) != digest.lower():
        raise BadInput(
            f"{tarball} has sha256 {seen}, expected {digest.lower()}\nDownload it again from a trusted source."
        )
    try:
        with tarball.open("rb") as file:
            images = client.images.load(file)
    except (APIError, ImageNotFound) as error:
        raise BadInput(f"Docker cannot load {tarball}: {cause(error)}") from None
    if len(images) != 1:
        raise BadInput(f"{tarball} holds {len(images)} images; expected one\nLoad it, and name the image's id instead.")
    return str(images[0].id)


def _ask(client: docker.DockerClient, identity: str, command: list[str]) -> tuple[int, str]:
    """Exit code and output of a short command in a container without network and mounts."""
    options = {"network_mode": "none", "environment": ENVIRONMENT, "stderr": True, "remove": True, "entrypoint": ""}
    try:
        return 0, client.containers.run(identity, command, **options).decode("utf-8", "replace").strip()
    except ContainerError as error:
        return error.exit_status, str(error.stderr or "").strip()
    except APIError as error:
        return 127, cause(error)

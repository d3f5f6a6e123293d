"""The image `axc`: built from the Dockerfile by the daemon, then rewritten so that equal inputs give an equal id."""

from __future__ import annotations

import hashlib
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import docker
from docker.errors import APIError, ImageNotFound
from docker.utils.build import exclude_paths

from axc import VERSION
from axrun.errors import BadInput
from ci.container import base, wheels
from ci.container.archive import Image, settle
from ci.container.daemon import cause
from ci.device.progress import took

ROOT = Path(__file__).resolve().parents[2]
TAG = "axc:latest"
BUILT = "axc-built:latest"  # the builder's output, before rewriting
BLOCK = 1 << 20  # chunk size of a saved image in bytes
EXTRA = ROOT / "ci" / "container" / "extra"
# The files that determine the image. The code is not in it: a build mounts the checkout.
ENVIRONMENT = (
    "Dockerfile",
    "board/hatch_build.py",
    "board/pyproject.toml",
    "ci/container/packages.sh",
    "ci/container/packages.txt",
    "ci/container/settle.sh",
    "pyproject.toml",
    "requirements/build.txt",
    "requirements/install.py",
    "requirements/reference.txt",
    "requirements/torch.txt",
)
LABEL = "axc.environment"  # label with the digest of ENVIRONMENT
STAGE = "axc.stage"  # label of intermediate images
Say = Callable[[str], None]


def make(
    client: docker.DockerClient, output: Path, *, base_image: str, mirror: str, fresh: bool = False, say: Say = print
) -> Image:
    """Builds the image as an archive at `output`, without loading it into the daemon (see `load`).

    `base_image` is any Debian image, by default that of base.py. `fresh` ignores all caches except that base image.
    Raises BadInput with the builder's error, and CheckFailed like `base.make`.
    """
    if not base_image and label(client, base.TAG, base.LABEL) != base.digest():
        with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
            load(client, base.make(Path(scratch) / "base.tar", mirror, say=say), base.TAG)
    started = time.monotonic()
    say("wheels: downloading the locked ones, by hash; some minutes the first time ...")
    wheels.gather(EXTRA / "wheels", Path(sys.prefix))
    say(f"wheels: complete{took(started)}")
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        saved = Path(scratch) / "saved.tar"
        try:
            started = time.monotonic()
            say("image: the daemon builds it ...")
            _build(client, base_image, fresh, say)
            say(f"image: built{took(started)}; rewriting it without timestamps ...")
            with saved.open("wb") as file:
                file.writelines(client.api.get_image(BUILT, chunk_size=BLOCK))
        except APIError as error:
            raise BadInput(f"cannot build the image: {cause(error)}") from None
        finally:
            _forget(client, fresh)
        return settle(saved, output, TAG, base.epoch())


def load(client: docker.DockerClient, image: Image, tag: str) -> None:
    """Loads an archive into the daemon; removes the image that had its tag before, unless it is in use."""
    before = _id(client, tag)
    with image.path.open("rb") as file:
        for line in client.api.load_image(file, quiet=True):
            if "error" in line:
                raise BadInput(f"the daemon cannot load {image.path}: {line['error']}")
    if before is not None and before != _id(client, tag):
        _remove(client, before)


def is_current(client: docker.DockerClient) -> bool:
    """Whether the daemon has an image `axc` of this checkout's Dockerfile and locks."""
    return label(client, TAG, LABEL) == environment()


def environment(root: Path = ROOT) -> str:
    """Digest of the files in ENVIRONMENT."""
    digest = hashlib.sha256()
    for name in ENVIRONMENT:
        digest.update(hashlib.sha256((root / name).read_bytes()).digest())
    return digest.hexdigest()


def label(client: docker.DockerClient, image: str, name: str) -> str:
    """A label of an image; empty if there is no such image or label."""
    try:
        return str((client.images.get(image).labels or {}).get(name, ""))
    except ImageNotFound:
        return ""


def context(out: IO[bytes], root: Path = ROOT) -> None:
    """Writes the build context as a tar: the files allowed by .dockerignore, without times, owners and umask."""
    patterns = (root / ".dockerignore").read_text("utf-8").splitlines()
    names = {"Dockerfile", *exclude_paths(str(root), [line for line in patterns if line and line[0] != "#"])}
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in sorted(names):
            path = root / name
            entry = tar.gettarinfo(str(path), name)
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mtime = base.epoch()
            entry.mode = 0o755 if path.is_dir() or entry.mode & 0o100 else 0o644
            if path.is_file() and not path.is_symlink():
                with path.open("rb") as content:
                    tar.addfile(entry, content)
            else:
                tar.addfile(entry)


def _build(client: docker.DockerClient, base_image: str, fresh: bool, say: Say) -> None:
    with tempfile.TemporaryFile() as tar:
        context(tar)
        tar.seek(0)
        steps = client.api.build(
            fileobj=tar,
            custom_context=True,
            tag=BUILT,
            nocache=fresh,
            rm=True,
            forcerm=True,
            network_mode="host" if base_image else "none",  # our base has all packages, the context has all wheels
            buildargs={
                "BASE_IMAGE": base_image or base.TAG,
                "SOURCE_DATE_EPOCH": str(base.epoch()),
                "PIP_NO_INDEX": "1",
            },
            labels={LABEL: environment(), "org.opencontainers.image.version": VERSION},
            decode=True,
        )
        last: list[str] = []
        for line in _lines(steps):
            last = [*last, line][-8:]
            if line.startswith("Step "):
                say(f"  {line}")
        if not _id(client, BUILT):
            raise BadInput(f"cannot build the image: {' | '.join(last)[-1000:]}")


def _lines(steps: Iterator[dict[str, Any]]) -> Iterator[str]:
    """The builder's output by lines, its error last."""
    for step in steps:
        for line in str(step.get("error") or step.get("stream") or "").splitlines():
            if line.strip():
                yield line.strip()


def _forget(client: docker.DockerClient, fresh: bool) -> None:
    """Removes the builder's image. Its stages stay as a cache for the next build, except after a `fresh` one."""
    _remove(client, BUILT)
    if fresh:
        client.images.prune({"dangling": True, "label": [STAGE]})


def _remove(client: docker.DockerClient, image: str) -> None:
    try:
        client.images.remove(image)
    except APIError as error:
        if error.status_code not in (404, 409):  # already removed; in use
            raise


def _id(client: docker.DockerClient, tag: str) -> str | None:
    try:
        return str(client.images.get(tag).id)
    except ImageNotFound:
        return None

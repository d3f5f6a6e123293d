"""Runs `axc llm_build` in the container or in this process, with the same output bytes."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import docker
from docker.errors import APIError
from docker.models.containers import Container
from docker.types import Mount

from axrun.command import INTERRUPTED
from axrun.errors import BadInput, CheckFailed
from ci.container import image
from ci.container.archive import Image
from ci.container.daemon import cause, connect, is_local
from ci.device.holding import MARK
from ci.device.progress import took

ENGINES = ("auto", "docker", "local")
LABEL = "axc.run"  # label of our containers with the pid of the waiting process
MAKING = "ten to thirty minutes on two cores"
STOP_SECONDS = 60  # for an interrupted build to clean up
OUT_OF_MEMORY = 137


@dataclass(frozen=True)
class Choice:
    """`client` is the Docker daemon to use, None for this process; `reason` is shown to the user."""

    client: docker.DockerClient | None
    reason: str

    def __str__(self) -> str:
        return f"engine: {'docker' if self.client else 'local'} ({self.reason})"


def choose(wanted: str) -> Choice:
    """`auto` uses the container if the image is ready. It never builds the image, which takes minutes.

    Raises BadInput for an unknown name, and for `docker` without a local daemon.
    """
    if wanted not in ENGINES:
        raise BadInput(f"ENGINE is {wanted!r}; expected one of {', '.join(ENGINES)}")
    if wanted == "local":
        return Choice(None, "asked for")
    try:
        client = connect()
    except BadInput as error:
        if wanted == "docker":
            raise
        return Choice(None, str(error).partition("\n")[0])
    where = client.api.base_url if not is_local(client) else "the Docker daemon"
    if not is_local(client):
        if wanted == "docker":
            raise BadInput(f"the Docker daemon at {where} cannot mount this machine's folders\nUse ENGINE=local.")
        return Choice(None, f"the Docker daemon at {where} is on another machine")
    if image.is_current(client):
        return Choice(client, f"image {image.TAG} {image.label(client, image.TAG, image.LABEL)[:12]}")
    if wanted == "auto":
        return Choice(None, "Docker has no image with the current locks; `make image` builds one")
    return Choice(client, f"image {image.TAG} will be built first")


def ready(client: docker.DockerClient, *, base_image: str, mirror: str, say: Callable[[str], None] = print) -> None:
    """Builds the image unless it exists with this checkout's locks. Raises BadInput, CheckFailed."""
    if not image.is_current(client):
        renew(client, base_image=base_image, mirror=mirror, say=say)


def renew(client: docker.DockerClient, *, base_image: str, mirror: str, say: Callable[[str], None] = print) -> Image:
    """Builds the image and loads it into the daemon. Raises BadInput, CheckFailed."""
    say(f"{image.TAG}: base image, wheels, build and rewrite; {MAKING}, once per change of the locks")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="axc-image-") as scratch:
        made = image.make(client, Path(scratch) / "image.tar", base_image=base_image, mirror=mirror, say=say)
        image.load(client, made, image.TAG)
        say(f"{image.TAG}: {made.id}, {made.nbytes / 1e6:.0f} MB in {len(made.layers)} layers{took(started)}")
    return made


def offer(made: Image, tag: str) -> str:
    """Loads an archive into the daemon if one answers; returns a message."""
    try:
        client = connect()
    except BadInput as error:
        return f"not loaded: {str(error).partition(chr(10))[0]}"
    image.load(client, made, tag)
    return f"loaded as {tag}"


def llm_build(client: docker.DockerClient, arguments: Sequence[str]) -> int:
    """Runs this checkout's `axc llm_build` in the image as the calling user, without network; returns its exit code."""
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--input_path", "--output_path", "--model_config", "--check_report", "--calibrated"):
        known.add_argument(flag, type=Path)
    known.add_argument("--calibration", type=Path, action="append", default=[])
    places, _ = known.parse_known_args(arguments)
    writes = [place.absolute().parent for place in (places.output_path, places.check_report) if place]
    for folder in writes:
        folder.mkdir(parents=True, exist_ok=True)
    given = (places.input_path, places.model_config, places.calibrated, *places.calibration)
    reads = {place.absolute(): place.absolute() for place in given if place}
    return run(
        client,
        image.TAG,
        ["axc", "llm_build", *arguments],
        reads={image.ROOT: Path("/axc"), **reads},
        writes={folder: folder for folder in writes},
        folder=Path.cwd(),
    )


def run(
    client: docker.DockerClient,
    name: str,
    command: Sequence[str],
    *,
    reads: Mapping[Path, Path],
    writes: Mapping[Path, Path],
    folder: Path,
    environment: Mapping[str, str] | None = None,
    user: tuple[int, int] | None = None,
) -> int:
    """Runs a command in a new container of the image `name` and returns its exit code; Ctrl-C stops it.

    `reads` and `writes` map paths of this machine to paths in the container (read-only and writable mounts). It runs as
    `user` (uid, gid), by default the caller, without a network. Raises BadInput if it cannot be started.
    """
    terminal = sys.stdout.isatty()
    columns = {"COLUMNS": str(shutil.get_terminal_size().columns)} if terminal else {}
    mounts = [Mount(str(there), str(here.resolve()), "bind", read_only=True) for here, there in reads.items()]
    mounts += [Mount(str(there), str(here.resolve()), "bind") for here, there in writes.items()]
    with _interruptible():
        try:
            container = client.containers.create(
                name,
                list(command),
                entrypoint="",  # a vendor's image may have one
                user="{}:{}".format(*user or (os.getuid(), os.getgid())),
                working_dir=str(folder),
                mounts=mounts,
                environment={**columns, **(environment or {})},
                tmpfs={"/tmp": "rw,exec,mode=1777"},
                network_mode="none",
                cap_drop=["ALL"],
                cap_add=["DAC_OVERRIDE"],  # lets root write to other users' folders; no effect for others
                security_opt=["no-new-privileges"],
                labels={LABEL: str(os.getpid()), **({MARK: os.environ[MARK]} if MARK in os.environ else {})},
                tty=terminal,
            )
        except APIError as error:
            raise BadInput(f"cannot create a container of {name}: {cause(error)}") from None
        try:
            return _attend(container, terminal)
        finally:
            container.remove(force=True)


def _attend(container: Container, terminal: bool) -> int:
    """Starts the container, streams its output, and waits for its end."""
    try:
        said = container.attach(stdout=True, stderr=True, stream=True, demux=not terminal)
        container.start()
        for piece in said:
            for stream, data in zip((sys.stdout, sys.stderr), (piece,) if terminal else piece, strict=False):
                if data:
                    stream.buffer.write(data)
                    stream.flush()
        ended = container.wait()
    except KeyboardInterrupt:
        print("\ninterrupted: stopping the container", file=sys.stderr, flush=True)
        with contextlib.suppress(APIError):
            container.kill("SIGINT")
            container.wait(timeout=STOP_SECONDS)
        return INTERRUPTED
    except APIError as error:
        raise BadInput(f"cannot start the container: {cause(error)}") from None
    code = int(ended["StatusCode"])
    if code == OUT_OF_MEMORY:
        raise CheckFailed("the container was killed, perhaps out of memory\nLower PARALLEL and run it again.")
    return code


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Makes SIGTERM act like Ctrl-C."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

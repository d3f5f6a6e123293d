"""make verify-reproducible: builds base, image and bundle twice from scratch and compares every byte."""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import docker

from axc.fetch import fetch
from axc.models import load_model
from axrun.errors import BadInput, CheckFailed
from ci.container import base, compare, engine, image
from ci.container.archive import Image

MODEL = "tiny-qwen2"
SHOWN = 20  # named differences; the rest is counted
Say = Callable[[str], None]


def verify(client: docker.DockerClient, *, base_image: str, mirror: str, say: Say = print) -> None:
    """Reports each comparison. Raises CheckFailed after listing differences, and the errors of the build steps."""
    with tempfile.TemporaryDirectory(prefix="axc-reproduce-") as scratch:
        here = Path(scratch)
        if not base_image:
            say(f"base image, twice, from {mirror or base.OWN}")
            bases = [_timed(say, base.make, here / f"base{at}.tar", mirror) for at in (1, 2)]
            _compare(say, "base image", *bases)
            image.load(client, bases[0], base.TAG)
            bases[1].path.unlink()
        say("image, twice, without a cache")
        quiet = functools.partial(
            image.make, client, base_image=base_image, mirror=mirror, fresh=True, say=lambda line: None
        )
        images = [_timed(say, quiet, here / f"image{at}.tar") for at in (1, 2)]
        _compare(say, "image", *images)
        image.load(client, images[0], image.TAG)
        say(f"bundle of {MODEL}, twice, in the image")
        bundles = [build(client, here / f"bundle{at}" / MODEL, parallel) for at, parallel in ((1, 1), (2, 2))]
        found = list(compare.folders(*bundles))
        _fail(say, "bundle", found)
        files = [path for path in bundles[0].rglob("*") if path.is_file()]
        say(f"  the same: {len(files)} files, {sum(path.stat().st_size for path in files):,} bytes")


def build(client: docker.DockerClient, output: Path, parallel: int) -> Path:
    """Builds a bundle of the shipped model in the image. Raises BadInput if that fails."""
    spec = load_model(MODEL)
    flags = ["--input_path", str(fetch(spec, None)), "--output_path", str(output), "--model_name", spec.name]
    if code := engine.llm_build(client, [*flags, *spec.build.flags(), "--parallel", str(parallel)]):
        raise BadInput(f"the build in the image ended with exit code {code}")
    return output


def _timed(say: Say, make: Callable[..., Image], *where: Path | str) -> Image:
    started, used = time.monotonic(), sum(os.times()[:4])
    made = make(*where)
    spent = sum(os.times()[:4]) - used
    say(f"  {made.id}  {made.nbytes:,} bytes, {time.monotonic() - started:.0f} s, {spent:.0f} s of them computing here")
    return made


def _compare(say: Say, what: str, first: Image, second: Image) -> None:
    _fail(say, what, list(_differences(first, second)))
    say(f"  the same: {first.nbytes:,} bytes, {len(first.layers)} layers")


def _differences(first: Image, second: Image) -> Iterator[str]:
    yield from compare.images(first.path, second.path)
    yield from compare.files(first.path, second.path, "archive")


def _fail(say: Say, what: str, found: list[str]) -> None:
    for line in found[:SHOWN]:
        say(f"  {line}")
    if found:
        raise CheckFailed(f"two builds of the {what} differ: {len(found)} differences, the first is {found[0]}")

"""Reproducible image archives in the format of `docker save` and `docker load`.

A builder puts the current time into configuration, history and files. The archive written here is canonical, so that
the same files give the same image id with any builder:

    layers      timestamps clamped to the epoch; numeric owners without names; no device nodes
    config      only what a container needs (environment, user, command, labels); created at the epoch
    archive     config, layers in order, manifest.json; named by sha256
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from axrun.errors import BadInput
from axrun.format.bundle import sha256

MANIFEST = "manifest.json"
# fields kept of a builder's config; the others name its host, parent image or version
RUN_FIELDS = ("Cmd", "Entrypoint", "Env", "Labels", "User", "WorkingDir")
MAX_JSON = 16 << 20


@dataclass(frozen=True)
class Image:
    """An archive on disk. `id` is the image id: the sha256 of the config, which has the digests of the layers."""

    path: Path
    id: str
    layers: tuple[str, ...]  # sha256 of each layer's tar, lowest first

    @property
    def nbytes(self) -> int:
        return self.path.stat().st_size


def settle(saved: Path, output: Path, tag: str, epoch: int) -> Image:
    """Rewrites a saved image in canonical form. Raises BadInput for a damaged archive."""
    try:
        with tarfile.open(saved) as archive, tempfile.TemporaryDirectory(dir=output.parent) as scratch:
            described = _json(archive, MANIFEST)[0]
            config = _json(archive, described["Config"])
            layers = []
            for index, name in enumerate(described["Layers"]):
                layers.append(Path(scratch) / f"{index}.tar")
                with _member(archive, name) as layer:
                    settle_layer(layer, layers[-1], epoch)
            return write(output, tag, layers, config.get("config") or {}, config["architecture"], epoch)
    except (tarfile.TarError, KeyError, IndexError, TypeError, ValueError) as error:
        raise BadInput(f"{saved} is not a saved image: {type(error).__name__} {error}\nSave it again.") from None


def settle_layer(source: IO[bytes], output: Path, epoch: int) -> None:
    """Rewrites a layer's tar in the same order, with whole-second timestamps clamped to `epoch`."""
    with (
        tarfile.open(fileobj=source, mode="r|*") as layer,
        tarfile.open(output, "w", format=tarfile.PAX_FORMAT) as out,
    ):
        for entry in layer:
            name = entry.name.removeprefix("./")
            if name in ("", ".") or entry.isdev() or entry.isfifo():  # a container gets its own /dev
                continue
            settled = copy.copy(entry)
            settled.name = name
            settled.mtime = min(int(entry.mtime), epoch)
            settled.uname = settled.gname = ""
            settled.pax_headers = {key: value for key, value in entry.pax_headers.items() if key.startswith("SCHILY.")}
            if entry.islnk():
                settled.linkname = entry.linkname.removeprefix("./")
            out.addfile(settled, layer.extractfile(entry) if entry.isreg() else None)


def write(
    output: Path, tag: str, layers: Iterable[Path], run: Mapping[str, Any], architecture: str, epoch: int
) -> Image:
    """Writes an archive of `layers` (tar files, lowest first); `run` has the container fields of Docker's config."""
    ordered = [(sha256(layer), layer) for layer in layers]
    made = datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    config = _bytes(
        {
            "architecture": architecture,
            "os": "linux",
            "created": made,
            "config": {field: run[field] for field in RUN_FIELDS if run.get(field)},
            "history": [{"created": made, "created_by": "axc"} for _ in ordered],
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}" for digest, _ in ordered]},
        }
    )
    identity = hashlib.sha256(config).hexdigest()
    named = {"Config": f"{identity}.json", "RepoTags": [tag], "Layers": [f"{digest}.tar" for digest, _ in ordered]}
    with tarfile.open(output, "w", format=tarfile.PAX_FORMAT) as archive:
        _add(archive, f"{identity}.json", io.BytesIO(config), len(config), epoch)
        for digest, layer in dict(ordered).items():  # without duplicates
            with layer.open("rb") as content:
                _add(archive, f"{digest}.tar", content, layer.stat().st_size, epoch)
        manifest = _bytes([named])
        _add(archive, MANIFEST, io.BytesIO(manifest), len(manifest), epoch)
    return Image(output, f"sha256:{identity}", tuple(digest for digest, _ in ordered))


def layers_of(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Name and tar of each layer of an archive, lowest first. Raises BadInput."""
    try:
        with tarfile.open(path) as archive:
            for name in _json(archive, MANIFEST)[0]["Layers"]:
                with _member(archive, name) as layer:
                    yield name, layer
    except (tarfile.TarError, KeyError, IndexError, TypeError, ValueError) as error:
        raise BadInput(f"{path} is not a saved image: {type(error).__name__} {error}\nSave it again.") from None


def config_of(path: Path) -> dict[str, Any]:
    """The configuration in an archive. Raises BadInput."""
    try:
        with tarfile.open(path) as archive:
            return dict(_json(archive, _json(archive, MANIFEST)[0]["Config"]))
    except (tarfile.TarError, KeyError, IndexError, TypeError, ValueError, OSError) as error:
        raise BadInput(f"{path} is not a saved image: {type(error).__name__} {error}\nSave it again.") from None


def _add(archive: tarfile.TarFile, name: str, content: IO[bytes], size: int, epoch: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime = size, epoch
    archive.addfile(entry, content)


def _member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    """A member's content; follows links inside the archive (Docker links duplicate layers)."""
    content = archive.extractfile(name)
    if content is None:
        raise KeyError(name)
    return content


def _json(archive: tarfile.TarFile, name: str) -> Any:
    with _member(archive, name) as member:
        return json.loads(member.read(MAX_JSON))


def _bytes(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()

"""Fetches the checkpoint of a model, and verifies the digest of every pinned file.

Shipped models are in the repository, models in PyPI packages are installed with pip (`axc.fetch_package`). Models of
the Hugging Face Hub are read from a given folder, or downloaded into the user's cache; repositories without pins are
pinned first (`axc.hub_pins`). huggingface_hub 2.4 resumes a broken connection, but discards a partial file when the
process ends. So files are streamed with its `http_get` into `blobs/<etag>.incomplete` of the same cache, from where the
next run resumes.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from axc import fetch_package, hub_pins
from axc.models import Hub, ModelSpec, Package, PinnedFile, Shipped
from axrun.errors import BadInput

CONNECT_SECONDS = 8.0  # without an answer, before the Hub counts as out of reach
SHOWN_FROM = 64 << 20  # bytes; hashing less is too quick for a progress bar
CHUNK = 4 << 20  # bytes


def fetch(model: ModelSpec, model_dir: Path | None = None) -> Path:
    """The folder, or GGUF file, of `model`'s checkpoint: `model_dir` where given, else the shipped one, the Hub's or
    that of a package.

    Raises BadInput when a pinned file is missing or is not what was pinned, and when the Hub cannot be reached.
    """
    if isinstance(model.source, Shipped):
        return model_dir or model.source.path
    if isinstance(model.source, Package):
        return _from_package(model, model.source, model_dir)
    source, asked = model.source, model.asked
    if model_dir is not None:
        if source.files:
            _check_folder(model, source, model_dir)
        else:
            print(f"{model_dir} is taken as it is: no digests of {source.repo} are pinned", flush=True)
        return model_dir
    return _from_hub(asked, source if source.files else hub_pins.pin(asked, source))


def verify(path: Path, pin: PinnedFile, cure: str) -> None:
    """Raise BadInput, ending in `cure`, unless `path` holds the bytes that `pin` names."""
    size = path.stat().st_size
    if pin.size is not None and size != pin.size:
        raise BadInput(f"{path} has {size} bytes, {pin.size} are pinned: {cure}")
    algorithm, expected = ("sha256", pin.sha256) if pin.sha256 else ("git blob", pin.git_blob)
    digest = hashlib.sha256() if pin.sha256 else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    for chunk in _chunks(path, size):
        digest.update(chunk)
    if digest.hexdigest() != expected:
        raise BadInput(
            f"{path} is not the pinned file: {cure}\n{algorithm} seen     {digest.hexdigest()}\n"
            f"{algorithm} expected {expected}"
        )


def _chunks(path: Path, size: int) -> Iterator[bytes]:
    from tqdm import tqdm

    quiet = size < SHOWN_FROM or None  # None: quiet unless a terminal looks on
    with (
        tqdm(total=size, desc=f"verify {path.name}", unit="B", unit_scale=True, leave=False, disable=quiet) as bar,
        path.open("rb", buffering=0) as file,
    ):
        while chunk := file.read(CHUNK):
            bar.update(len(chunk))
            yield chunk


def _check_folder(model: ModelSpec, source: Hub, folder: Path) -> None:
    missing = [pin.name for pin in source.files if not (folder / pin.name).is_file()]
    if missing:
        there = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        raise BadInput(
            f"{folder} lacks {', '.join(missing)} of {source.repo}\n"
            f"it has {', '.join(there[:20]) or 'nothing, or is no folder'}"
        )
    for pin in source.files:
        verify(
            folder / pin.name,
            pin,
            f"get it from {source.repo} at {source.revision[:12]}, or compile the folder as it is with axc llm_build",
        )


def _from_package(model: ModelSpec, source: Package, given: Path | None) -> Path:
    """The model file; `given` is a copy of it, or the folder that has one."""
    name = Path(source.file.name).name
    if given is not None:
        path = given / name if given.is_dir() else given
        if not path.is_file():
            raise BadInput(f"{given} is not {name}, nor a folder with it")
        verify(
            path, source.file, f"get it from the package {source.package}, or compile it as it is with axc llm_build"
        )
        return path
    path = fetch_package.bring(model.name, source)
    verify(path, source.file, f"remove {path} and run again")
    return path


def _from_hub(name: str, source: Hub) -> Path:
    from huggingface_hub import try_to_load_from_cache

    folders = set()
    for pin in source.files:
        cached = try_to_load_from_cache(source.repo, pin.name, revision=source.revision)
        if isinstance(cached, str):
            path = Path(cached)
            verify(path, pin, f"remove {path.resolve()} and run again")
        else:
            path = _download(name, source, pin)
            try:
                verify(path, pin, "it is thrown away, run again; should that not help, what answers is not the Hub")
            except BadInput:
                path.resolve().unlink()
                path.unlink(missing_ok=True)
                raise
        folders.add(path.parents[len(PurePosixPath(pin.name).parts) - 1])
    (folder,) = folders
    return folder


def _download(name: str, source: Hub, pin: PinnedFile) -> Path:
    import httpx2
    from huggingface_hub import constants, hf_hub_download

    try:
        _stream_into_cache(source, pin)
        return Path(hf_hub_download(source.repo, pin.name, revision=source.revision, etag_timeout=CONNECT_SECONDS))
    except (httpx2.HTTPError, OSError) as error:
        seen = f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]
        raise BadInput(
            f"{pin.name} of {source.repo} did not come from {constants.ENDPOINT} ({seen[:160]})\n"
            "connect this machine, or name a mirror in HF_ENDPOINT, and run again: what has come so far is kept\n"
            f"or give a copy: make build MODEL={name} MODEL_DIR=/path/to/{source.repo.partition('/')[2]}"
        ) from error


def _stream_into_cache(source: Hub, pin: PinnedFile) -> None:
    """Put `pin` among the cache's blobs, going on from what an earlier run left; hf_hub_download then only links it.

    A server that does not name the file by its pinned digest is left to hf_hub_download altogether.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get, repo_folder_name
    from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]  # loaded lazily

    url = hf_hub_url(source.repo, pin.name, revision=source.revision)
    offered = get_hf_file_metadata(url, timeout=CONNECT_SECONDS)
    if offered.etag is None or offered.etag not in (pin.sha256, pin.git_blob):
        return
    folder = repo_folder_name(repo_id=source.repo, repo_type="model")
    cache = Path(constants.HF_HUB_CACHE)
    blob, lock = cache / folder / "blobs" / offered.etag, cache / ".locks" / folder / f"{offered.etag}.lock"
    part = blob.with_name(f"{blob.name}.incomplete")
    headers = build_hf_headers()
    if urlsplit(offered.location).netloc != urlsplit(url).netloc:
        headers.pop("authorization", None)  # the token is the Hub's, not its storage's
    for made in (blob, lock):
        made.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            return
        if offered.size is not None and part.exists() and part.stat().st_size > offered.size:
            part.unlink()
        with part.open("ab") as file:
            _check_space(cache, pin, (offered.size or 0) - file.tell())
            http_get(
                offered.location,
                file,
                resume_size=file.tell(),
                headers=headers,
                expected_size=offered.size,
                displayed_filename=pin.name,
            )
        part.rename(blob)


def _check_space(folder: Path, pin: PinnedFile, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BadInput(
            f"{pin.name} needs {needed / 1e6:.0f} MB more in {folder}, which has {free / 1e6:.0f} MB free\n"
            "make room, or name a cache elsewhere in HF_HOME, and run again"
        )

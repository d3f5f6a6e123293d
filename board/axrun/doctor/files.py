"""The stage `files`: all files in the manifest exist, are intact, and have the content that their name says."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Union

from axrun.doctor.flags import described, weight_types
from axrun.doctor.report import Finding
from axrun.doctor.stages import refused
from axrun.errors import BadInput, Failure
from axrun.format import axmodel
from axrun.format.axmodel import LFS_POINTER, Axmodel
from axrun.format.bundle import MANIFEST, Bundle, read_manifest, sha256
from axrun.format.dtypes import FLOATS

STAGE = "files"
MOST_MANIFEST = 64 << 20  # bytes
MOST_TEXT = 64 << 20  # maximum size for checks of line ends and for JSON files
MOST_ENTRIES = 100_000  # maximum number of files and folders
MOST_NAMED = 3  # names to list for one kind of fault
COPY = "Copy the bundle again: rsync -a --delete --checksum."
BUILD = "Build the bundle again."

Progress = Callable[[int], None]
Shape = tuple[Union[int, str], ...]


def files(folder: Path, progress: Progress = lambda nbytes: None) -> str | Finding:
    """Compares every file of a bundle with the manifest, and the header of every axmodel with its part.

    `progress(bytes)` is called while hashing. Never raises because of file contents.
    """
    try:
        manifest = _manifest(folder)
        found = _stored(folder, manifest, progress) or _readable(folder, manifest)
        if found:
            return found
        bundle = Bundle.open(folder)
        found = _axmodels(bundle)
        if found:
            return found
    except Failure as failure:
        if MANIFEST in str(failure):
            return refused(STAGE, failure, "the manifest", MANIFEST)
        return refused(STAGE, failure, "the bundle's description")
    entries = manifest["files"]
    size = sum(entry["size"] for entry in entries.values())
    return (
        f"{len(entries)} files, {size / 1e6:.1f} MB, match the manifest; {bundle.layers} layers and post, "
        f"made by {bundle.maker}"
    )


def manifest_digest(folder: Path) -> str:
    """The sha256 of the manifest, which identifies the bundle; empty if it cannot be read."""
    path = folder / MANIFEST
    try:
        return sha256(path) if path.is_file() and path.stat().st_size <= MOST_MANIFEST else ""
    except OSError:
        return ""


def _manifest(folder: Path) -> dict[str, Any]:
    """Raises BadInput."""
    path = folder / MANIFEST
    try:
        size = path.stat().st_size if path.is_file() else 0
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}\n{COPY}") from None
    if size > MOST_MANIFEST:
        raise BadInput(f"{path} has {size:,} bytes, a manifest at most {MOST_MANIFEST:,}\n{COPY}")
    return read_manifest(folder)


def _stored(folder: Path, manifest: Mapping[str, Any], progress: Progress) -> Finding | None:
    """The first file that is missing, not a regular file, changed, or not part of the bundle."""
    entries: Mapping[str, Any] = manifest["files"]
    present = _present(folder)
    missing = [name for name in entries if name not in present]
    extra = sorted(present.keys() - entries.keys() - {MANIFEST})
    if missing:
        near = f"; there is {extra[0]}, which is not part of the bundle" if extra else ""
        return _finding(
            f"{_some(missing)} missing",
            missing[0],
            f"{len(entries)} files",
            f"{len(entries) - len(missing)} of them{near}",
            "the copy was cut short, a disk was full, or a file was renamed",
            COPY,
        )
    if odd := [name for name in entries if not stat.S_ISREG(present[name].st_mode)]:
        return _finding(
            f"{_some(odd)} not a regular file",
            odd[0],
            "a regular file",
            "a link" if stat.S_ISLNK(present[odd[0]].st_mode) else "a folder or a device",
            "the copy tool kept or created links",
            COPY,
        )
    if wrong := [name for name, entry in entries.items() if present[name].st_size != entry["size"]]:
        name = wrong[0]
        cause, advice = _resized(folder / name, entries[name], present[name].st_size)
        seen = f"{present[name].st_size:,} bytes"
        return _finding(_damaged(wrong), name, f"{entries[name]['size']:,} bytes", seen, cause, advice)
    return _other_bytes(folder, entries, progress) or _extra(extra)


def _other_bytes(folder: Path, entries: Mapping[str, Any], progress: Progress) -> Finding | None:
    seen: dict[str, str] = {}
    for name, entry in entries.items():
        digest = sha256(folder / name, progress)
        if digest != entry["sha256"]:
            seen[name] = digest
    if not seen:
        return None
    owners = {entry["sha256"]: name for name, entry in entries.items()}
    name = next((name for name in seen if seen[name] in owners), next(iter(seen)))
    expected = f"sha256 {entries[name]['sha256'][:16]}..."
    other = owners.get(seen[name])
    if other:
        swapped = other in seen and owners.get(seen[other]) == name
        cause = f"the two files were swapped: {name} and {other}" if swapped else f"{other} was copied over it"
        return _finding(f"{name} holds the bytes of {other}", name, expected, f"the sha256 of {other}", cause, COPY)
    cause = "changed after the build: edited, or damaged by a disk or a transfer"
    return _finding(_damaged(list(seen)), name, expected, f"sha256 {seen[name][:16]}..., same size", cause, COPY)


def _extra(extra: list[str]) -> Finding | None:
    if not extra:
        return None
    return _finding(
        f"{_some(extra)} not part of this bundle",
        extra[0],
        "only what the manifest lists",
        ", ".join(extra[:MOST_NAMED]),
        "left over from another build, or copied there by hand",
        f"Remove the extra files, or: {COPY}",
    )


def _resized(path: Path, entry: Mapping[str, Any], size: int) -> tuple[str, str]:
    """Cause and advice for a file with a wrong size."""
    with path.open("rb") as file:
        head = file.read(len(LFS_POINTER))
    if not size:
        return "the disk was full, or the copy was cut short", COPY
    if head == LFS_POINTER:
        return "a Git LFS pointer instead of the file", "Run git lfs pull in its repository, and copy it again."
    if entry["size"] < size <= MOST_TEXT:
        unix = path.read_bytes().replace(b"\r\n", b"\n")
        if hashlib.sha256(unix).hexdigest() == entry["sha256"]:
            return "line ends became CRLF: copied as text, or checked out by Git on Windows", COPY
    if size < entry["size"]:
        return "edited, from another build, or the copy was cut short", COPY
    return "from another build, or data was appended", COPY


def _present(folder: Path) -> dict[str, os.stat_result]:
    """All files and empty folders below a folder by relative name; links are not followed."""
    found: dict[str, os.stat_result] = {}

    def failed(error: OSError) -> None:
        raise BadInput(f"cannot list {error.filename}: {error.strerror or error}\n{COPY}") from None

    for root, folders, names in os.walk(folder, onerror=failed):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        empty = root != os.fspath(folder) and not folders and not names
        for path in [os.path.join(root, name) for name in (*names, *links)] + [root] * empty:
            found[os.path.relpath(path, folder).replace(os.sep, "/")] = os.lstat(path)
        if len(found) > MOST_ENTRIES:
            raise BadInput(f"{folder} holds more than {MOST_ENTRIES:,} files: it is not a bundle\n{COPY}")
    return found


def _readable(folder: Path, manifest: Mapping[str, Any]) -> Finding | None:
    """Checks that every JSON file of the bundle is valid."""
    for name, entry in manifest["files"].items():
        if not name.endswith(".json") or entry["size"] > MOST_TEXT:
            continue
        try:
            json.loads((folder / name).read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            cause = "edited by hand before the manifest was written, or damaged in the checkpoint"
            return _finding(f"{name} is not valid JSON", name, "a JSON document", f"{error!s:.80}", cause, BUILD)
    return None


def _axmodels(bundle: Bundle) -> Finding | None:
    """Checks that every axmodel is complete and has the part, groups, types and shapes in the manifest."""
    for what, expected, seen in described(bundle):
        return _finding(what, MANIFEST, expected, seen, "the manifest was edited, or belongs to another build", BUILD)
    names = [(bundle.layer_path(index), f"layer {index}") for index in range(bundle.layers)]
    for path, part in [*names, (bundle.post_path, "post")]:
        try:
            model = axmodel.read(path)
        except BadInput as failure:
            return refused(STAGE, failure, f"{path.name} is not a complete axmodel", path.name)
        for what, expected, seen in _differences(bundle, part, model):
            cause = (
                "built with other options than the rest, or copied from another bundle before the manifest was written"
            )
            return _finding(f"{part}: {what}", path.name, expected, seen, cause, BUILD)
    rows = bundle.vocab_size * bundle.hidden_size * 2
    if (size := bundle.embedding_path.stat().st_size) != rows:
        shape = f"{rows:,} bytes: {bundle.vocab_size} x {bundle.hidden_size} bfloat16"
        cause = "the table belongs to another model or vocabulary"
        return _finding("the embedding table", bundle.embedding_file, shape, f"{size:,} bytes", cause, BUILD)
    return None


def _differences(bundle: Bundle, part: str, model: Axmodel) -> Iterator[tuple[str, str, str]]:
    """Differences as (what, expected, seen). The vendor's format is closed: only the maker is checked."""
    ours = bundle.maker == "cpu"
    if model.ours != ours:
        made = model.producer_name or "an unknown compiler"
        yield "maker", "axc" if ours else "the vendor's compiler", made
    if not (ours and model.ours):
        return
    if model.part != part:
        yield "part", part, model.part or "none"
    flag = "post_weight_type" if part == "post" else "weight_type"
    for where, found in weight_types(model):
        if found and found != bundle.flag(flag):
            yield f"weight type, {where}", f"{flag} {bundle.flag(flag)}", found
    chip = bundle.flag("chip")
    if chip and (seen_chip := model.metadata.get("axmodel.chip", "")) != chip:
        yield "chip", chip, seen_chip or "none"
    groups = bundle.groups if part != "post" else model.groups
    if (seen := [(group.tokens, group.history) for group in model.groups]) != (
        expected := [(group.tokens, group.history) for group in groups]
    ):
        yield "groups (tokens, history)", f"{expected}", f"{seen}"
    for info in (*model.inputs, *model.outputs):
        wanted = _tensor(bundle, part, info.name)
        if wanted and (info.dtype, info.shape) != wanted:
            yield f"tensor {info.name}", f"{wanted[0]}{list(wanted[1])}", f"{info.dtype}{list(info.shape)}"
    known = {info.name for info in (*model.inputs, *model.outputs)}
    if part == "post" and bool(asked := bundle.manifest["flags"].get("post_topk")) != ("indices" in known):
        yield "top-k", f"post_topk {asked!r:.20}", "indices" if "indices" in known else "no indices"
    required = _required(part, model.caches)
    if lacking := [name for name in required if name not in known]:
        yield "tensors", ", ".join(required), f"no {', '.join(lacking)}"


def _required(part: str, caches: bool) -> tuple[str, ...]:
    if part == "post" or not caches:
        return "input", "output"
    return "K_cache", "V_cache", "indices", "input", "mask", "K_cache_out", "V_cache_out", "output"


def _tensor(bundle: Bundle, part: str, name: str) -> tuple[str, Shape] | None:
    """Type and shape of a tensor in docs/axmodel.md; None for other tensors."""
    hidden, dtype = bundle.hidden_size, FLOATS[bundle.hidden_state_type]
    known: dict[str, tuple[str, Shape]] = {
        "K_cache": (dtype, (1, "T", bundle.kv_size)),
        "V_cache": (dtype, (1, "T", bundle.kv_size)),
        "K_cache_out": (dtype, (1, "M", bundle.kv_size)),
        "V_cache_out": (dtype, (1, "M", bundle.kv_size)),
        "indices": ("UINT32", (1, "M")),
        "mask": (dtype, (1, "M", "T+M")),
        "input": (dtype, (1, "M", hidden)),
        "output": (dtype, (1, "M", hidden)),
    }
    if part == "post":
        logits = (1, "M", bundle.vocab_size)
        known = {"input": known["input"], "output": (dtype, logits), "logits": ("FLOAT", logits)}
    return known.get(name)


def _some(names: list[str]) -> str:
    """The first name and the number of others: `a is`, `a and 2 more are`."""
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"


def _damaged(names: list[str]) -> str:
    return f"{_some(names)} not as built"


def _finding(part: str, file: str, expected: str, seen: str, cause: str, advice: str) -> Finding:
    return Finding(STAGE, part, file, expected, seen, cause, advice)

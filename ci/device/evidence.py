"""Proves that the measured release is the deployed one, file by file.

A deploy writes a record on the deploying machine. The measuring run takes an inventory of the board before and after,
and notes the libraries that its commands loaded; both go into figures.json. The verdict compares them with the record
and with the bundle of the night.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from axrun.errors import BadInput
from axrun.format.bundle import MANIFEST
from axrun.format.logits import NAME as REFERENCE
from ci.device import commands, strict_json
from ci.device.listing import Listing

ENGINES = re.compile(r"libax_(engine|sys)\.so(\.\d+)*")
SCHEMA = 1
MOST_FAULTS = 20
# Environment variables that change the code that runs although no file differs.
CHANGING = re.compile(r"AXC_\w+|AXRUN_\w+|LD_PRELOAD|LD_AUDIT")

Inventory = Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """The record of a deploy: names, the sha256 of every file of package and model, the board's interpreter."""

    board: str
    release: str
    package: str
    model: str
    release_json: str
    package_files: Mapping[str, str] = field(repr=False)
    model_files: Mapping[str, str] = field(repr=False)
    python: Mapping[str, str] = field(default_factory=dict)  # from interpreter() of ci/device/on_board/tree.py
    maker: str = ""  # of the bundle

    @property
    def manifest_sha256(self) -> str:
        return self.model_files.get(MANIFEST, "")

    @property
    def engines(self) -> dict[str, str]:
        """The package's engine libraries: sha256 by path."""
        return {path: digest for path, digest in self.package_files.items() if ENGINES.fullmatch(Path(path).name)}

    def named(self) -> dict[str, str]:
        """The identity of the release, stored with the figures."""
        return {
            "release": self.release,
            "package": self.package,
            "model": self.model,
            "manifest_sha256": self.manifest_sha256,
        }


def place(out: Path, board: str) -> Path:
    """The record file of a board for deploys from `out`."""
    return out / "deployed" / f"{board}.json"


def write(file: Path, record: Record) -> None:
    """Raises BadInput if the file cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"schema": SCHEMA, **dataclasses.asdict(record)}, sort_keys=True) + "\n", "utf-8")
    except OSError as error:
        raise BadInput(f"cannot write {file}: {error.strerror or error}") from None


def read(file: Path) -> Record:
    """Raises BadInput for a missing or invalid record."""
    try:
        values = strict_json.read(file)
    except FileNotFoundError:
        raise BadInput(
            f"no deploy is recorded in {file}, so the release on the board is unknown\n"
            f"First: {commands.invoke('deploy', '--board', file.stem)}"
        ) from None
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {file}: {error}") from None
    known = {entry.name: entry for entry in dataclasses.fields(Record)}
    if values.pop("schema", None) != SCHEMA or set(values) != set(known):
        raise BadInput(
            f"{file} is not the record of a deploy\nDeploy again: {commands.invoke('deploy', '--board', file.stem)}"
        )
    return Record(**values)


def files(listing: Listing) -> dict[str, str]:
    return {path: digest for path, digest, _ in listing.files}


def compare(record: Record, seen: Inventory) -> list[str]:
    """Differences between a board's inventory and the deploy record, each naming its file, the worst first."""
    return list(_compare(record, seen))[:MOST_FAULTS]


def _compare(record: Record, seen: Inventory) -> Iterator[str]:
    expected = f"releases/{record.release}"
    if seen["current"] != expected:
        yield f"current points at {_show(seen['current'] or 'nothing')}, deployed was {expected}"
    for path, what in seen["folders"]:
        if what != "folder":
            yield f"{_show(path)} is {_what(what)}, expected a folder of its own"
    release = {
        "package": f"link to ../../packages/{record.package}",
        "model": f"link to ../../models/{record.model}",
        "axrun": "link to package/bin/axrun",
        "release.json": record.release_json,
    }
    yield from _other_python(record.python, seen["python"])
    yield from _differences(f"releases/{record.release}", release, seen["release"])
    yield from _differences(f"packages/{record.package}", record.package_files, seen["package"])
    yield from _differences(f"models/{record.model}", record.model_files, seen["model"])


def shown(python: Mapping[str, str]) -> str:
    """An interpreter as text."""
    return f"{_show(python['program'])} ({_show(python['version'])}, sha256 {_show(python['program_sha256'][:12])})"


def wrapped(python: Mapping[str, str]) -> str:
    """The wrapper in PATH that starts the interpreter, as text; empty if `python3` is the interpreter itself."""
    if python["found"] == python["program"]:
        return ""
    return f"{_show(python['found'])} (sha256 {_show(python['found_sha256'][:12])}), which runs {shown(python)}"


def _other_python(deployed: Mapping[str, str], seen: Mapping[str, str]) -> Iterator[str]:
    """Differences between the interpreter and the one recorded by the deploy."""
    if around := wrapped(seen):
        yield f"python3 is {around}, expected the interpreter itself"
    elif deployed and dict(deployed) != dict(seen):
        yield f"python3 is {shown(seen)}, deployed with was {shown(deployed)}"


def _differences(folder: str, expected: Mapping[str, str], entries: Iterable[Sequence[str]]) -> Iterator[str]:
    there = {path: what for path, what in entries}  # noqa: C416  (lists, not pairs)
    for path, what in expected.items():
        found = there.get(path, "nothing")
        if found == what:
            continue
        if found == "nothing":
            yield f"{folder}/{_show(path)} is missing"
        elif _is_digest(found) and _is_digest(what):
            digests = f"sha256 {found[:12]}, deployed {what[:12]}"
            yield f"{folder}/{_show(path)} has other bytes than were deployed ({digests})"
        else:
            yield f"{folder}/{_show(path)} is {_what(found)}, deployed was {_what(what)}"
    for path in sorted(there.keys() - expected.keys()):
        yield f"{folder}/{_show(path)} was not deployed: {_what(there[path])}"


def loaded(
    record: Record, root: str, libraries: Mapping[str, str], variables: Collection[str], ours: bool
) -> list[str]:
    """Faults of the libraries (path -> sha256, from /proc) that a command loaded on the board.

    `root` is the absolute folder of the releases. `ours`: the axmodels need our engine. `variables` are the names of
    the command's environment variables.
    """
    package = f"{root}/packages/{record.package}/"
    names = {Path(path).name for path in record.package_files if ".so" in path}
    faults = []
    for path, digest in sorted(libraries.items()):
        inside = path[len(package) :] if path.startswith(package) else None
        if inside is not None and record.package_files.get(inside) != digest:
            faults.append(f"{_show(path)} was loaded but differs from the deployed file (sha256 {digest[:12]})")
        elif inside is None and (Path(path).name in names and (ours or not ENGINES.fullmatch(Path(path).name))):
            faults.append(f"{_show(path)} was loaded instead of the package's {Path(path).name}")
    engines = [path for path in libraries if Path(path).name.startswith("libax_engine.so")]
    if ours and not engines:
        faults.append("no libax_engine.so was loaded: the engine that ran is unknown")
    faults += [f"the board's environment sets {_show(name)}, which changes what runs"
               for name in sorted(variables) if CHANGING.fullmatch(name)]  # fmt: skip
    return faults


def engine(libraries: Mapping[str, str]) -> dict[str, str]:
    """Path and sha256 of the engine's library among the loaded ones; empty if there is none."""
    found = sorted(path for path in libraries if Path(path).name.startswith("libax_engine.so"))
    return {"path": found[0], "sha256": libraries[found[0]]} if found else {}


def differences(record: Record, manifest: Mapping[str, Any], seen: Mapping[str, Any]) -> list[str]:
    """Differences between the night's build, its deploy and the release named by its figures; empty if they agree.

    `manifest` is that of the built bundle, `seen` the content of figures.json.
    """
    return list(_unlike(record, manifest, seen))[:MOST_FAULTS]


def _unlike(record: Record, manifest: Mapping[str, Any], seen: Mapping[str, Any]) -> Iterator[str]:
    built = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    for name in sorted(built.keys() | (record.model_files.keys() - {MANIFEST})):
        if built.get(name) != record.model_files.get(name):
            yield f"{name} differs between build and deploy"
    evidence = seen.get("evidence")
    if not isinstance(evidence, dict):
        yield "the measured release is unknown: figures.json has no evidence"
        return
    for key, value in record.named().items():
        if evidence.get(key) != value:
            yield f"the measured {key} is {evidence.get(key)!a:.40}, deployed was {value:.40}"
    yield from (str(fault)[:300] for fault in evidence.get("faults") or [])
    for what in ("evaluation", "bench"):
        measured = seen.get(what)
        if isinstance(measured, dict) and measured.get("manifest_sha256") != record.manifest_sha256:
            yield f"axrun {what} measured a bundle whose manifest.json differs from the deployed one"
    evaluation = seen.get("evaluation")
    if isinstance(evaluation, dict) and evaluation.get("reference_sha256") != record.model_files.get(REFERENCE):
        yield f"axrun eval used a {REFERENCE} that differs from the deployed one"


def _what(what: str) -> str:
    return f"a file (sha256 {what[:12]})" if _is_digest(what) else _show(what)


def _is_digest(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{64}", text) is not None


def _show(text: str) -> str:
    """A name reported by a board, printable and bounded."""
    return ascii(text if len(text) <= 160 else f"...{text[-157:]}")[1:-1]

"""What a deploy runs on the board: the folders of packages, models and releases.

    <root>/packages/<id>/   the runner with its dependencies      <id> is a hash of the content
    <root>/packages/<id>.compiled/  its bytecode
    <root>/models/<id>/     a bundle                              <id> is a hash of the content
    <root>/releases/<id>/   package -> ../../packages/<id>, model -> ../../models/<id>, axrun, release.json
    <root>/current          -> releases/<id>
    <root>/history          past targets of `current`, oldest first
    <root>/incoming/        transfers in progress

A folder is renamed into place after it is complete and verified, and `current` is replaced by a rename. So `current` is
a complete release at any time, even after a power cut.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shutil
import time
from pathlib import Path
from typing import Any

from ci.device.on_board import compiled, proc, tree
from ci.device.on_board.process import SHOWN, run
from ci.device.on_board.requests import Refused, answer

LOCK_SECONDS = 5  # for an interrupted deploy to notice and free the lock
POLL_SECONDS = 0.05
REPORT = 1 << 19  # bytes of a doctor's report
STORES = ("packages", "models")


Listing = list[list[Any]]  # [path, sha256, size in bytes] of every file


class Releases:
    """The folder of all releases; its public methods are the requests."""

    def __init__(self, root: str) -> None:
        self.root = Path.home() / root
        self.current = self.root / "current"
        self.history = self.root / "history"
        self._lock: Any = None

    def above(self) -> Path:
        """The folder of the releases, or its nearest existing parent."""
        return next(path for path in (self.root, *self.root.parents) if path.is_dir())

    def facts(self) -> dict[str, Any]:
        """The facts that a deploy checks first; sizes in bytes, None for unknown values."""
        above = self.above()
        disk = os.statvfs(above)
        return {
            "architecture": platform.machine(),
            "python": platform.python_version(),
            "interpreter": tree.interpreter(),
            "glibc": platform.libc_ver()[1],
            "rsync": shutil.which("rsync"),
            "root": str(self.root),
            "writable": os.access(str(above), os.W_OK | os.X_OK),
            "read_only": bool(disk.f_flag & os.ST_RDONLY),
            "free": disk.f_bavail * disk.f_frsize,
            "memory": proc.memory("MemAvailable"),
            "cmm": proc.cmm("remain"),
            "engine_library": proc.vendors_engine(),
            "current": self.linked(),
        }

    def lock(self, owner: str) -> None:
        """Takes the lock; the kernel frees it when this process ends."""
        self.root.mkdir(parents=True, exist_ok=True)
        lock = (self.root / "lock").open("a+")
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    lock.seek(0)
                    raise Refused("locked", lock.read(200).strip() or "somebody") from None
            time.sleep(POLL_SECONDS)
        self._lock = lock
        lock.truncate(0)
        lock.write(owner)
        lock.flush()

    def survey(self, store: str, name: str, listing: Listing) -> dict[str, Any]:
        """Whether `name` exists; if not, where to send it, a folder to link from, and the needed and free bytes.

        Files with the same path and content in the current release will be hard-linked and need no space.
        """
        place, incoming = self._places(store, name)
        disk = os.statvfs(str(self.root))
        free = disk.f_bavail * disk.f_frsize
        if place.is_dir():
            return {"whole": True, "into": str(place), "like": None, "needed": 0, "free": free}
        like, known = self._like(store)
        needed = sum(size for path, digest, size in listing if known.get(path) != digest)
        arrived = sum(entry.st_size for entry in map(os.lstat, incoming.rglob("*")) if entry.st_nlink == 1)
        incoming.mkdir(parents=True, exist_ok=True)
        return {"whole": False, "into": str(incoming), "like": like, "needed": max(needed - arrived, 0), "free": free}

    def verify(self, store: str, name: str, listing: Listing) -> list[str]:
        """Faults of the files of `name`, compared with the listing; empty if all match."""
        place, incoming = self._places(store, name)
        folder = place if place.is_dir() else incoming
        faults = []
        for path, digest, size in listing:
            file = folder / path
            if file.is_symlink() or not file.is_file():
                faults.append(f"{path} is missing")
            elif file.stat().st_size != size or tree.sha256(file) != digest:
                faults.append(f"{path} has other bytes")
        wanted = {path for path, _, _ in listing}
        for file in sorted(folder.rglob("*")):
            path = file.relative_to(folder).as_posix()
            if (file.is_symlink() or not file.is_dir()) and path not in wanted:
                faults.append(f"{path} does not belong there")
        return faults[:20]

    def inventory(self, release: str, package: str, model: str) -> dict[str, Any]:
        """The inventory: the target of `current`, and every entry of a release, its package and its model.

        Entries are [path, kind]: a file's sha256, "link to ...", "empty folder" or "no file". No symlink is followed.
        `folders` are their parent folders, which must not be symlinks.
        """
        places = {
            "release": self.root / "releases" / _identity(release),
            "package": self.root / "packages" / _identity(package),
            "model": self.root / "models" / _identity(model),
        }
        found: dict[str, Any] = {
            what: list(tree.entries(path)) if path.is_dir() and not path.is_symlink() else []
            for what, path in places.items()
        }
        above = [folder for path in places.values() for folder in (path.parent, path)]
        found["folders"] = [[path.relative_to(self.root).as_posix(), tree.kind(path)] for path in above]
        found["root"] = os.path.realpath(str(self.root))
        found["boot"] = tree.boot()
        found["python"] = tree.interpreter()
        try:
            found["current"] = os.readlink(str(self.current))
        except OSError:
            found["current"] = "no link" if self.current.exists() else None
        return found

    def forget_compiled(self, package: str) -> None:
        """Removes the bytecode of a package, so that Python recompiles it from the present sources."""
        shutil.rmtree(str(self.root / "packages" / f"{_identity(package)}.compiled"), ignore_errors=True)

    def compiled(self, package: str, limit: float) -> list[str]:
        """Faults of a package's bytecode: files that do not match their sources."""
        return compiled.faults(compiled.folder(self.root / "packages" / _identity(package)), limit)

    def keep(self, store: str, name: str, listing: Listing) -> None:
        """Moves a verified folder into place."""
        place, incoming = self._places(store, name)
        if not place.is_dir():
            place.parent.mkdir(exist_ok=True)
            (place.parent / f"{name}.json").write_text(json.dumps({path: digest for path, digest, _ in listing}))
            os.sync()  # otherwise a power cut could leave the name without the content
            os.replace(str(incoming), str(place))
        _sync(place.parent)

    def assemble(self, name: str, release: dict[str, Any]) -> None:
        """Makes a release of an existing package and model."""
        folder = self.root / "releases" / _identity(name)
        if folder.is_dir():
            return
        part = self.root / "incoming" / f"release-{name}"
        shutil.rmtree(str(part), ignore_errors=True)
        part.mkdir(parents=True)
        for link, store in (("package", "packages"), ("model", "models")):
            if not (self.root / store / _identity(release[link])).is_dir():
                raise Refused("damaged", f"{store}/{release[link]} is not on the board")
            (part / link).symlink_to(Path("..") / ".." / store / release[link])
        (part / "axrun").symlink_to("package/bin/axrun")
        (part / "release.json").write_text(json.dumps(release, sort_keys=True))
        folder.parent.mkdir(exist_ok=True)
        os.replace(str(part), str(folder))
        _sync(folder.parent)

    def release(self, name: str) -> Any:
        """The release.json of a release."""
        try:
            return json.loads((self.root / "releases" / _identity(name) / "release.json").read_text())
        except (OSError, ValueError) as error:
            raise Refused("damaged", f"release {name}: {error}") from None

    def ask(self, name: str, engine: str, prompt: str, tokens: int, limit: float) -> dict[str, Any]:
        """Runs a prompt greedily with a release: exit code (None: timed out), stdout, the end of stderr."""
        folder = self.root / "releases" / _identity(name)
        command = [
            "sh",
            str(folder / "axrun"),
            "run",
            str(folder / "model"),
            f"--prompt={prompt}",
            "--json",
            "--greedy",
            "--no-speculation",  # speeds of different runners then compare
        ]
        command += ["--max-tokens", str(tokens), "--engine", engine]
        return run(command, limit, SHOWN)

    def examine(self, engine: str, limit: float) -> dict[str, Any]:
        """Runs `axrun doctor` of the current release on its bundle; the result is like that of `ask`."""
        name = self.linked()
        if name is None:
            raise Refused("bad", "no release was deployed yet")
        folder = self.root / "releases" / name
        command = ["sh", str(folder / "axrun"), "doctor", str(folder / "model"), "--json", "--engine", engine]
        return {"release": name, **run(command, limit, REPORT)}

    def switch(self, name: str) -> str | None:
        """Makes a release current; returns the previous one. History after the previous one (rollbacks) is dropped."""
        if not (self.root / "releases" / _identity(name)).is_dir():
            raise Refused("damaged", f"release {name} is not on the board")
        was = self.linked()
        past = self.past()
        self._write(self.history, "".join(f"{entry}\n" for entry in [*past, name] if entry))
        self._link(name)
        return was

    def previous(self) -> str | None:
        """The release before the current one; None if there is none."""
        past = [name for name in self.past() if (self.root / "releases" / name).is_dir()]
        earlier = [name for name in past if name != self.linked()]
        return earlier[-1] if earlier else None

    def back(self, name: str) -> None:
        """Makes an earlier release current. The history stays, so that another rollback goes further back."""
        self.release(name)
        self._link(name)

    def prune(self, keep: int) -> list[str]:
        """Removes all but the last `keep` releases, unused packages and models, and incomplete transfers."""
        current = self.linked()
        there = {folder.name: folder for folder in self.folders("releases")}
        past = [name for name in self.past() if name != current and name in there][::-1]
        kept = {current, *past[: max(keep - 1, 0)]}
        removed = [folder for name, folder in there.items() if name not in kept]
        for folder in removed:
            self._remove(folder)
        for link, store in (("package", "packages"), ("model", "models")):
            used = {os.path.basename(os.readlink(str(folder / link))) for folder in self.folders("releases")}
            for folder in self.folders(store):
                if folder.name not in used:
                    self._remove(folder)
                    (folder.parent / f"{folder.name}.json").unlink(missing_ok=True)
                    shutil.rmtree(f"{folder}.compiled", ignore_errors=True)
        shutil.rmtree(str(self.root / "incoming"), ignore_errors=True)
        return sorted(folder.name for folder in removed)

    def incoming(self) -> int:
        """The size of incomplete transfers in bytes."""
        return sum(os.lstat(str(path)).st_size for path in (self.root / "incoming").rglob("*") if path.is_file())

    def drop(self) -> None:
        """Removes incomplete transfers."""
        shutil.rmtree(str(self.root / "incoming"), ignore_errors=True)

    def _places(self, store: str, name: str) -> tuple[Path, Path]:
        if store not in STORES:
            raise Refused("bad", f"no store {store!r}")
        return self.root / store / _identity(name), self.root / "incoming" / f"{store}-{name}"

    def linked(self) -> str | None:
        """The name of the current release."""
        try:
            target = os.readlink(str(self.current))
        except OSError:
            return None
        name = os.path.basename(target)
        return name if re.fullmatch("[0-9a-f]{16}", name) else None

    def past(self) -> list[str]:
        """The history up to the current release, without duplicates (the last occurrence counts)."""
        listed = re.findall("^[0-9a-f]{16}$", proc.read(self.history), re.MULTILINE)
        current = self.linked()
        if current in listed:
            listed = listed[: len(listed) - listed[::-1].index(current)]
        elif current:
            listed.append(current)
        return [name for index, name in enumerate(listed) if name not in listed[index + 1 :]]

    def _like(self, store: str) -> tuple[str | None, dict[str, str]]:
        """The folder of the current release's package or model, and the sha256 of its files."""
        link = self.current / ("package" if store == "packages" else "model")
        if not link.is_dir():
            return None, {}
        folder = link.resolve()
        try:
            known = json.loads((folder.parent / f"{folder.name}.json").read_text())
        except (OSError, ValueError):
            known = {}
        return str(folder), known

    def _link(self, name: str) -> None:
        fresh = self.root / "current.new"
        if fresh.is_symlink():
            fresh.unlink()
        fresh.symlink_to(Path("releases") / name)
        os.replace(str(fresh), str(self.current))
        _sync(self.root)

    def _write(self, path: Path, text: str) -> None:
        fresh = path.with_name(f"{path.name}.new")
        with fresh.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(str(fresh), str(path))

    def folders(self, store: str) -> list[Path]:
        found = (self.root / store).glob("*")
        return [path for path in found if re.fullmatch("[0-9a-f]{16}", path.name) and path.is_dir()]

    def _remove(self, folder: Path) -> None:
        """Out of sight first: what is half removed has no name any more."""
        gone = self.root / "incoming" / f"removed-{folder.parent.name}-{folder.name}"
        gone.parent.mkdir(exist_ok=True)
        os.replace(str(folder), str(gone))
        shutil.rmtree(str(gone))


def _identity(name: str) -> str:
    if not isinstance(name, str) or not re.fullmatch("[0-9a-f]{16}", name):
        raise Refused("bad", f"{name!r} is not a valid name of a release")
    return name


def _sync(folder: Path) -> None:
    opened = os.open(str(folder), os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def main(root: str) -> None:
    answer(Releases(root))

"""What a deploy runs on the board: sent over SSH, it reads one JSON object a line and answers each with one.

    <root>/packages/<id>/   the runner with all it imports        named by its content
    <root>/packages/<id>.compiled/  what Python made of it
    <root>/models/<id>/     a bundle                              named by its content
    <root>/releases/<id>/   package -> ../../packages/<id>, model -> ../../models/<id>, axrun, release.json
    <root>/current          -> releases/<id>
    <root>/history          what `current` has been, oldest first
    <root>/incoming/        what is on its way

A folder gets its name by a rename once all of it is there and verified, and `current` changes by a rename: whenever
this ends, `current` is a whole release. It needs Python 3.9 and nothing else.
"""

from __future__ import annotations

import fcntl
import getpass
import hashlib
import json
import os
import platform
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

IDLE_SECONDS = 3600  # without a request, the other side is gone, whatever the network says
BLOCK = 1 << 20
LOCK_SECONDS = 5  # for one that was interrupted to notice it
POLL_SECONDS = 0.05
SHOWN = 4000  # characters of what a program said
REPORT = 1 << 19  # of a doctor's report
STORES = ("packages", "models")
ENGINE_LIBRARIES = ("/soc/lib/libax_engine.so", "/usr/lib/libax_engine.so", "/opt/lib/libax_engine.so")


Listing = list[list[Any]]  # [path, sha256, size in bytes] of every file


class Refused(Exception):
    """What is asked cannot be done: a kind for the program that asked, and a text."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Releases:
    """The folder of all releases, as the requests see it."""

    def __init__(self, root: str) -> None:
        self.root = Path.home() / root
        self.current = self.root / "current"
        self.history = self.root / "history"
        self._lock: Any = None

    def facts(self) -> dict[str, Any]:
        """What a deploy wants to know first; sizes in bytes, None where the board does not tell."""
        above = next(path for path in (self.root, *self.root.parents) if path.is_dir())
        disk = os.statvfs(above)
        cmm = re.search(r"total size.*?remain=(\d+)KB\(", _text("/proc/ax_proc/mem_cmm_info"))
        memory = re.search(r"^MemAvailable:\s+(\d+) kB", _text("/proc/meminfo"), re.MULTILINE)
        return {
            "architecture": platform.machine(),
            "python": platform.python_version(),
            "glibc": platform.libc_ver()[1],
            "rsync": shutil.which("rsync"),
            "root": str(self.root),
            "writable": os.access(str(above), os.W_OK | os.X_OK),
            "read_only": bool(disk.f_flag & os.ST_RDONLY),
            "free": disk.f_bavail * disk.f_frsize,
            "memory": int(memory.group(1)) << 10 if memory else None,
            "cmm": int(cmm.group(1)) << 10 if cmm else None,
            "engine_library": next((path for path in ENGINE_LIBRARIES if os.path.exists(path)), None),
            "current": self._linked(),
        }

    def status(self) -> dict[str, Any]:
        """What the board says of itself and of its current release; None where it does not tell. Sizes in bytes."""
        above = next(path for path in (self.root, *self.root.parents) if path.is_dir())
        disk = os.statvfs(above)
        current = self._linked()
        try:
            release = self.release(current) if current else {}
        except Refused:
            release = {}
        cmm = re.search(r"total size=(\d+)KB", _text("/proc/ax_proc/mem_cmm_info"))
        memory = re.search(r"^MemTotal:\s+(\d+) kB", _text("/proc/meminfo"), re.MULTILINE)
        system = re.search(r'^PRETTY_NAME="?([^"\n]*)', _text("/etc/os-release"), re.MULTILINE)
        uptime = re.match(r"\d+", _text("/proc/uptime"))
        return {
            "user": getpass.getuser(),
            "host": platform.node(),
            "system": system.group(1) if system else platform.system(),
            "kernel": platform.release(),
            "board": _word("/proc/device-tree/model"),
            "bsp": _word("/proc/ax_proc/version"),
            "board_id": _word("/proc/ax_proc/board_id"),
            "chip": _word("/proc/ax_proc/chip_type"),
            "uptime": int(uptime.group()) if uptime else None,
            "memory_total": int(memory.group(1)) << 10 if memory else None,
            "cmm_total": int(cmm.group(1)) << 10 if cmm else None,
            "disk_total": disk.f_blocks * disk.f_frsize,
            "temperatures": _temperatures(),
            "devices": [[path, "yes" if os.access(path, os.R_OK | os.W_OK) else "no"] for path in _devices()],
            "engines": [[path, _engine_version(path)] for path in self._engines()],
            "releases": [name for name in self._past() if (self.root / "releases" / name).is_dir()],
            "package": str(release["package"]) if "package" in release else None,
            "model": str(release["name"]) if "name" in release else None,
            "prompt": str(release["prompt"])[:SHOWN] if "prompt" in release else None,
            "locked": self._held(),
        }

    def _held(self) -> str | None:
        """Who deploys right now."""
        try:
            with (self.root / "lock").open("r") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return lock.read(200).strip() or "somebody"
        except OSError:
            pass
        return None

    def _engines(self) -> list[str]:
        """The engine's libraries: the package's for this kind of machine, and the vendor's."""
        ours = sorted(str(path) for path in (self.current / "package").glob("*/engine/lib/libax_engine.so"))
        return [*ours, *(path for path in ENGINE_LIBRARIES if os.path.exists(path))]

    def lock(self, owner: str) -> None:
        """Until this process ends, however it ends, nobody else gets the lock."""
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
        """Whether `name` is there; else where to send it, what to compare with, and the bytes it takes and there are.

        What has the same name and content in the current release will be linked, and takes nothing.
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
        """What is wrong with the files of `name`, where it lies; nothing when every one is as listed."""
        place, incoming = self._places(store, name)
        folder = place if place.is_dir() else incoming
        faults = []
        for path, digest, size in listing:
            file = folder / path
            if file.is_symlink() or not file.is_file():
                faults.append(f"{path} is missing")
            elif file.stat().st_size != size or _sha256(file) != digest:
                faults.append(f"{path} has other bytes")
        wanted = {path for path, _, _ in listing}
        for file in sorted(folder.rglob("*")):
            path = file.relative_to(folder).as_posix()
            if (file.is_symlink() or not file.is_dir()) and path not in wanted:
                faults.append(f"{path} does not belong there")
        return faults[:20]

    def inventory(self, release: str, package: str, model: str) -> dict[str, Any]:
        """What lies on the board: where `current` points, and every entry of a release, its package and its model.

        Entries are [path, what]: a file's sha256, "link to ...", "empty folder" or "no file"; no link is followed.
        `folders` are the folders above them that must be folders of their own, not links to others.
        """
        places = {
            "release": self.root / "releases" / _identity(release),
            "package": self.root / "packages" / _identity(package),
            "model": self.root / "models" / _identity(model),
        }
        found: dict[str, Any] = {
            what: list(_entries(path)) if path.is_dir() and not path.is_symlink() else []
            for what, path in places.items()
        }
        above = [folder for path in places.values() for folder in (path.parent, path)]
        found["folders"] = [[path.relative_to(self.root).as_posix(), _kind(path)] for path in above]
        found["root"] = os.path.realpath(str(self.root))
        found["boot"] = _boot()
        try:
            found["current"] = os.readlink(str(self.current))
        except OSError:
            found["current"] = "no link" if self.current.exists() else None
        return found

    def forget_compiled(self, package: str) -> None:
        """Removes what Python compiled of a package, so that it is compiled anew from the files that are there."""
        shutil.rmtree(str(self.root / "packages" / f"{_identity(package)}.compiled"), ignore_errors=True)

    def keep(self, store: str, name: str, listing: Listing) -> None:
        """What has been verified gets its place."""
        place, incoming = self._places(store, name)
        if not place.is_dir():
            place.parent.mkdir(exist_ok=True)
            (place.parent / f"{name}.json").write_text(json.dumps({path: digest for path, digest, _ in listing}))
            os.sync()  # or a power cut could leave the name without the bytes
            os.replace(str(incoming), str(place))
        _sync(place.parent)

    def assemble(self, name: str, release: dict[str, Any]) -> None:
        """A release of a package and a model that are there."""
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
        """A release's greedy answer to a prompt: exit code (None: not done in time), stdout, the end of stderr."""
        folder = self.root / "releases" / _identity(name)
        command = [
            "sh",
            str(folder / "axrun"),
            "run",
            str(folder / "model"),
            f"--prompt={prompt}",
            "--json",
            "--greedy",
        ]
        command += ["--max-tokens", str(tokens), "--engine", engine]
        return _run(command, limit, SHOWN)

    def examine(self, engine: str, limit: float) -> dict[str, Any]:
        """What `axrun doctor` of the current release says of its bundle, as `ask` returns it."""
        name = self._linked()
        if name is None:
            raise Refused("bad", "there is no release yet: nothing was deployed")
        folder = self.root / "releases" / name
        command = ["sh", str(folder / "axrun"), "doctor", str(folder / "model"), "--json", "--engine", engine]
        return {"release": name, **_run(command, limit, REPORT)}

    def switch(self, name: str) -> str | None:
        """`current` becomes a release, and what came after the one it was is forgotten; returns what it was."""
        if not (self.root / "releases" / _identity(name)).is_dir():
            raise Refused("damaged", f"release {name} is not on the board")
        was = self._linked()
        past = self._past()
        self._write(self.history, "".join(f"{entry}\n" for entry in [*past, name] if entry))
        self._link(name)
        return was

    def previous(self) -> str | None:
        """The release before the current one, None where there is none."""
        past = [name for name in self._past() if (self.root / "releases" / name).is_dir()]
        earlier = [name for name in past if name != self._linked()]
        return earlier[-1] if earlier else None

    def back(self, name: str) -> None:
        """`current` becomes an earlier release; the history stays, so that going back again goes further back."""
        self.release(name)
        self._link(name)

    def prune(self, keep: int) -> list[str]:
        """Removes all but the last `keep` releases, with what only they used, and what never arrived."""
        current = self._linked()
        there = {folder.name: folder for folder in self._folders("releases")}
        past = [name for name in self._past() if name != current and name in there][::-1]
        kept = {current, *past[: max(keep - 1, 0)]}
        removed = [folder for name, folder in there.items() if name not in kept]
        for folder in removed:
            self._remove(folder)
        for link, store in (("package", "packages"), ("model", "models")):
            used = {os.path.basename(os.readlink(str(folder / link))) for folder in self._folders("releases")}
            for folder in self._folders(store):
                if folder.name not in used:
                    self._remove(folder)
                    (folder.parent / f"{folder.name}.json").unlink(missing_ok=True)
                    shutil.rmtree(f"{folder}.compiled", ignore_errors=True)
        shutil.rmtree(str(self.root / "incoming"), ignore_errors=True)
        return sorted(folder.name for folder in removed)

    def incoming(self) -> int:
        """Bytes of what is on its way and did not arrive."""
        return sum(os.lstat(str(path)).st_size for path in (self.root / "incoming").rglob("*") if path.is_file())

    def drop(self) -> None:
        """Forgets what is on its way, to make room again."""
        shutil.rmtree(str(self.root / "incoming"), ignore_errors=True)

    def _places(self, store: str, name: str) -> tuple[Path, Path]:
        if store not in STORES:
            raise Refused("bad", f"no store {store!r}")
        return self.root / store / _identity(name), self.root / "incoming" / f"{store}-{name}"

    def _linked(self) -> str | None:
        """The name of the current release."""
        try:
            target = os.readlink(str(self.current))
        except OSError:
            return None
        name = os.path.basename(target)
        return name if re.fullmatch("[0-9a-f]{16}", name) else None

    def _past(self) -> list[str]:
        """The history up to the current release, each once, the last time it was current."""
        listed = re.findall("^[0-9a-f]{16}$", _text(self.history), re.MULTILINE)
        current = self._linked()
        if current in listed:
            listed = listed[: len(listed) - listed[::-1].index(current)]
        elif current:
            listed.append(current)
        return [name for index, name in enumerate(listed) if name not in listed[index + 1 :]]

    def _like(self, store: str) -> tuple[str | None, dict[str, str]]:
        """The folder of the current release's package or model, and what each of its files holds."""
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

    def _folders(self, store: str) -> list[Path]:
        found = (self.root / store).glob("*")
        return [path for path in found if re.fullmatch("[0-9a-f]{16}", path.name) and path.is_dir()]

    def _remove(self, folder: Path) -> None:
        """Out of sight first: what is half removed has no name any more."""
        gone = self.root / "incoming" / f"removed-{folder.parent.name}-{folder.name}"
        gone.parent.mkdir(exist_ok=True)
        os.replace(str(folder), str(gone))
        shutil.rmtree(str(gone))


def _run(command: list[str], limit: float, shown: int) -> dict[str, Any]:
    """A program's exit code (None: not done in time), the start of its stdout and the end of its stderr."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True
        )
        deadline = time.monotonic() + limit
        while process.poll() is None:
            gone = bool(select.select([sys.stdin], [], [], POLL_SECONDS)[0])  # nothing but its end is to come now
            if gone or time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if gone:
                    sys.exit()
                return {"code": None, "stdout": "", "stderr": ""}
        return {"code": process.returncode, "stdout": _start(stdout, shown), "stderr": _end(stderr)}


def _identity(name: str) -> str:
    if not isinstance(name, str) or not re.fullmatch("[0-9a-f]{16}", name):
        raise Refused("bad", f"{name!r} is no name of a release")
    return name


def _boot() -> str:
    """Another text after every start of the board: its kernel's, and of its first process."""
    first = _text("/proc/1/stat").rpartition(")")[2].split()
    return f"{_text('/proc/sys/kernel/random/boot_id').strip()} {first[19] if len(first) > 19 else ''}"


def _entries(folder: Path) -> Iterator[list[str]]:
    """[path, what] of everything below a folder but the folders that hold something."""
    waiting = [folder]
    while waiting:
        inside = waiting.pop()
        listed = sorted(os.scandir(str(inside)), key=lambda entry: entry.name)
        if not listed and inside != folder:
            yield [inside.relative_to(folder).as_posix(), "empty folder"]
        for entry in listed:
            path = Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                waiting.append(path)
            else:
                yield [path.relative_to(folder).as_posix(), _kind(path)]


def _kind(path: Path) -> str:
    """A file's sha256, "link to ...", "folder", "nothing", or "no file" for a device and the like."""
    try:
        mode = os.lstat(str(path)).st_mode
    except FileNotFoundError:
        return "nothing"
    if stat.S_ISLNK(mode):
        return f"link to {os.readlink(str(path))}"
    if stat.S_ISDIR(mode):
        return "folder"
    return _sha256(path) if stat.S_ISREG(mode) else "no file"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(BLOCK), b""):
            digest.update(block)
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    opened = os.open(str(folder), os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _start(file: IO[bytes], shown: int) -> str:
    file.seek(0)
    return file.read(shown).decode("utf-8", "replace")


def _end(file: IO[bytes]) -> str:
    file.seek(max(file.seek(0, os.SEEK_END) - SHOWN, 0))
    return file.read(SHOWN).decode("utf-8", "replace")


def _word(path: str) -> str | None:
    """The first line of a file, None where there is no such file."""
    lines = _text(path).replace("\0", "").strip().splitlines()
    return lines[0][:SHOWN] if lines else None


def _devices() -> list[str]:
    return sorted(str(path) for path in Path("/dev").glob("ax_*"))[:32]


def _temperatures() -> list[list[str]]:
    """[zone, degrees Celsius] of every sensor that the kernel knows."""
    zones = sorted(Path("/sys/class/thermal").glob("thermal_zone*"))[:16]
    found = [(_word(str(zone / "type")) or zone.name, _word(str(zone / "temp")) or "") for zone in zones]
    return [[name, f"{int(text) / 1000:.1f}"] for name, text in found if re.fullmatch(r"-?\d+", text)]


def _engine_version(path: str) -> str:
    """What a libax_engine says its version is, asked in a process of its own; empty where it does not."""
    code = (
        "import ctypes, sys; get = ctypes.CDLL(sys.argv[1]).AX_ENGINE_GetVersion; get.restype = ctypes.c_char_p; "
        "print((get() or b'').decode('utf-8', 'replace'))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", code, path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "replace").strip()[:200]


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text("utf-8", errors="replace")
    except OSError:
        return ""


def main(root: str) -> None:
    releases = Releases(root)
    _answer({"ok": "ready"})
    while select.select([sys.stdin], [], [], IDLE_SECONDS)[0]:
        line = sys.stdin.buffer.readline()
        if not line:
            break
        request = json.loads(line)
        verb = request.pop("do")
        try:
            answer = {"ok": getattr(releases, verb)(**request)}
        except Refused as refused:
            answer = {"error": refused.kind, "text": str(refused)}
        except OSError as error:
            kind = "space" if error.errno in (28, 122) else "system"  # ENOSPC, EDQUOT
            answer = {"error": kind, "text": f"{error.strerror}: {error.filename}"}
        _answer(answer)


def _answer(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])

"""Bring the chat page's Markdown libraries into board/axrun/serve/page/lib, as package-lock.json locks them.

Its development packages are what the page is tested with; they are brought into tests/serve/page/lib.

npm fetches the archives; the machine's own npm, or else the one of the set `page`. An archive that lies in the folder
WHEELS is taken from there, so that a machine without a network can have them too. Every archive is checked by its hash.
Only the standard library is needed.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from requirements.install import LOCKS, ROOT, SetupFailed, environment, install, last_error

LOCK = LOCKS / "package-lock.json"
LIB = ROOT / "board" / "axrun" / "serve" / "page" / "lib"
TEST_LIB = ROOT / "tests" / "serve" / "page" / "lib"
# package: the file of it that the page loads, and the name that is served
MODULES = {
    "dompurify": ("dist/purify.es.mjs", "purify.js"),
    "markdown-it": ("dist/browser/markdown-it.esm.min.mjs", "markdown-it.js"),
}
TEST_MODULES = {"axe-core": ("axe.min.js", "axe.js")}
STAMP = "made-from"  # in LIB: the digest of what decided its content
MOST_ARCHIVE, MOST_FILE = 16 << 20, 1 << 20  # bytes
FETCH_SECONDS = 300


@dataclass(frozen=True)
class Package:
    """A locked npm package; `integrity` as npm writes it, e.g. "sha512-" and the digest in base64."""

    name: str
    version: str
    integrity: str

    @property
    def archive(self) -> str:
        """The file name that `npm pack` gives it."""
        return f"{self.name}-{self.version}.tgz"


def bring(venv: Path, lock: Path = LOCK, lib: Path = LIB, dev: bool = False) -> None:
    """Fills `lib` with the page's modules, or those of its tests, and all licences, unless it holds those of this lock.

    Raises SetupFailed when an archive cannot be had or is not the locked one; `lib` is then as it was.
    """
    wanted = fingerprint(lock)
    if (lib / STAMP).is_file() and (lib / STAMP).read_text() == wanted:
        return
    packages = locked(lock, dev)
    lib.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=lib.parent, prefix="lib.part-") as scratch:
        archives, made = Path(scratch, "archives"), Path(scratch, "lib")
        archives.mkdir()
        gather(packages, archives, lambda: npm(venv))
        (made / "licences").mkdir(parents=True)
        for package in packages:
            unpack(package, archives / package.archive, made)
        (made / STAMP).write_text(wanted)
        made.chmod(0o755)
        shutil.rmtree(lib, ignore_errors=True)
        made.rename(lib)
    names = ", ".join(f"{package.name} {package.version}" for package in packages)
    print(f"setup: the page's {'test' if dev else 'Markdown'} libraries are there: {names}")


def fingerprint(lock: Path) -> str:
    """Digest of what decides the content of `LIB`."""
    return hashlib.sha256(lock.read_bytes() + Path(__file__).read_bytes()).hexdigest()


def locked(lock: Path, dev: bool = False) -> list[Package]:
    """What the lock names for the page, or for its tests, without optional packages (types for a compiler).

    The modules bundle the others' code.
    """
    entries = json.loads(lock.read_text())["packages"].items()
    return [
        Package(path.removeprefix("node_modules/"), entry["version"], entry["integrity"])
        for path, entry in entries
        if path and not entry.get("optional") and entry.get("dev", False) == dev
    ]


def gather(packages: Sequence[Package], into: Path, find_npm: Callable[[], str]) -> None:
    """Brings the archives into a folder: those in WHEELS from there, the rest by npm. Raises SetupFailed."""
    given = os.environ.get("WHEELS")
    missing = []
    for package in packages:
        local = Path(given).expanduser() / package.archive if given else None
        if local is not None and local.is_file():
            shutil.copyfile(local, into / package.archive)
        else:
            missing.append(package)
    if not missing:
        return
    names = " ".join(package.archive for package in missing)
    way = f"connect this machine, or put {names} into a folder and name it: WHEELS=folder"
    try:
        command = [
            *(find_npm(), "pack", "--ignore-scripts", "--silent", "--fetch-retries=1", "--fetch-timeout=60000"),
            *(f"--pack-destination={into}", *(f"{package.name}@{package.version}" for package in missing)),
        ]
        done = subprocess.run(
            command,
            cwd=into,
            env={**environment(), "npm_config_loglevel": "error"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=FETCH_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SetupFailed(f"the page's libraries did not come: npm took longer than {FETCH_SECONDS} s\n{way}") from None
    except (SetupFailed, OSError) as error:
        raise SetupFailed(f"the page's libraries did not come: {str(error).partition(chr(10))[0]}\n{way}") from None
    if done.returncode:
        said = last_error(done.stderr or done.stdout or "npm said nothing")
        raise SetupFailed(f"the page's libraries did not come: {said}\n{way}")


def npm(venv: Path) -> str:
    """The command: this machine's, or the one of the set `page`. Raises SetupFailed."""
    if found := shutil.which("npm"):
        return found
    install(venv, "page")
    return str(venv / "bin" / "npm")


def unpack(package: Package, archive: Path, into: Path) -> None:
    """Writes a package's module and licence. Raises SetupFailed for an archive that is not the locked one."""
    content = archive.read_bytes() if archive.is_file() and archive.stat().st_size <= MOST_ARCHIVE else b""
    algorithm, _, digest = package.integrity.partition("-")
    seen = base64.b64encode(hashlib.new(algorithm, content).digest()).decode()
    if seen != digest:
        raise SetupFailed(
            f"{package.archive} is not the file that was locked: its {algorithm} is {seen[:12]}..., expected "
            f"{digest[:12]}...\nremove it from where it came from, and run the same again"
        )
    module, served = {**MODULES, **TEST_MODULES}.get(package.name, ("", ""))
    written = set()
    with tarfile.open(fileobj=io.BytesIO(content)) as files:
        for member in files:
            name = member.name.partition("/")[2]  # all lie in one folder
            if name == module:
                target = served
            elif "/" not in name and name.upper().startswith(("LICENSE", "LICENCE")):
                target = f"licences/{package.name}-{name.partition('.')[0]}.txt"
            else:
                continue
            if member.isfile() and member.size <= MOST_FILE and (source := files.extractfile(member)) is not None:
                (into / target).write_bytes(source.read())
                written.add(target)
    if module and served not in written:
        raise SetupFailed(f"{package.archive} has no {module}: does MODULES of requirements/page.py fit the lock?")
    if written <= {served}:
        raise SetupFailed(f"{package.archive} has no licence, and what it holds may not be passed on without one")

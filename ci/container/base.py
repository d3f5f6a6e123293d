"""The base image, built from Debian packages without an image registry.

mmdebstrap makes a bit-reproducible root file system from packages.txt: versions and digests are recorded, timestamps
are clamped to SOURCE_DATE_EPOCH, and what mmdebstrap copies from this machine (host name, name servers, the mirror's
address) is overwritten.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from axrun.errors import BadInput, CheckFailed
from ci.container.archive import Image, settle_layer, write
from ci.device import commands
from ci.device.progress import Say, took, watched

TAG = "axc-base:latest"
MAKING, MAKING_SECONDS = "one to five minutes", 3600
SUITE = "bookworm"  # its Python is 3.11, the oldest with wheels in the locks
OWN = "Debian's own mirror"  # mmdebstrap's default
INCLUDE = ("ca-certificates", "python3", "python3-venv")
RECORD = Path(__file__).with_name("packages.txt")
HEADER = """\
# The Debian packages of the base image: name, version, architecture, sha256 of the .deb.
# Recorded by `invoke base-image --record`; SOURCE_DATE_EPOCH is the suite's own date then.
SOURCE_DATE_EPOCH {epoch}
"""
LABEL = "axc.packages"  # label with the sha256 of the record
STANZAS = "packages.stanzas"
SHOWN = 30  # named differences; on another architecture than the recorded one, all packages differ
HOOKS = (
    'chroot "$1" sh -c "echo localhost >/etc/hostname; : >/etc/resolv.conf"',
    'APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-cache show --no-all-versions '
    "$(dpkg-query --admindir=\"$1\"/var/lib/dpkg --show --showformat='${Package}=${Version} ') "
    f'>"$1"/{STANZAS}',
    f"download /{STANZAS} {STANZAS}",
    f'rm "$1"/{STANZAS}',
    ': >"$1"/etc/apt/sources.list',
)
# skip manuals, keep licences
EXCLUDED = ("path-exclude=/usr/share/doc/*", "path-include=/usr/share/doc/*/copyright", "path-exclude=/usr/share/man/*")


@dataclass(frozen=True)
class Package:
    """A Debian package."""

    name: str
    version: str
    architecture: str
    sha256: str

    def line(self) -> str:
        return f"{self.name} {self.version} {self.architecture} {self.sha256}"


@dataclass(frozen=True)
class Record:
    """The content of packages.txt."""

    epoch: int  # seconds since 1970
    packages: Mapping[str, Package]

    @classmethod
    def read(cls, path: Path = RECORD) -> Record:
        """Raises BadInput for an invalid line."""
        lines = [line.split() for line in path.read_text("utf-8").splitlines() if not line.startswith("#")]
        try:
            (_, epoch), *rows = lines
            packages = [Package(*row) for row in rows]
            return cls(int(epoch), {package.name: package for package in packages})
        except (ValueError, TypeError):
            raise BadInput(
                f"{path} is damaged\nRestore it, or record it again: {commands.invoke('base-image', '--record')}"
            ) from None


def epoch(record: Path = RECORD) -> int:
    """SOURCE_DATE_EPOCH from the environment, by default the recorded one. Raises BadInput."""
    said = os.environ.get("SOURCE_DATE_EPOCH", "")
    if said and not (said.isascii() and said.isdigit()):
        raise BadInput(f"SOURCE_DATE_EPOCH is {said!r}; expected seconds since 1970")
    return int(said) if said else Record.read(record).epoch


def make(
    output: Path, mirror: str, *, record: Path = RECORD, renew: bool = False, say: Say = lambda line: None
) -> Image:
    """Makes the base image as an archive at `output`; an empty `mirror` is Debian's own.

    Raises BadInput, and CheckFailed naming the packages that differ from the record. With `renew` the record is updated
    instead.
    """
    made_at = epoch(record)
    # absolute: mmdebstrap runs in the scratch folder, and Python before 3.12 keeps a relative one relative
    with tempfile.TemporaryDirectory(dir=output.parent.resolve()) as scratch:
        tree = Path(scratch) / "base.tar"
        found = _debootstrap(tree, mirror, made_at, say)
        if renew:
            rows = "".join(f"{found[name].line()}\n" for name in sorted(found))
            record.write_text(HEADER.format(epoch=made_at) + rows, "utf-8")
        elif faults := list(differences(Record.read(record).packages, found)):
            more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
            raise CheckFailed(
                f"{len(faults)} packages of {mirror or OWN} differ from the record: {'; '.join(faults[:SHOWN])}{more}\n"
                "Use a mirror that still has the recorded ones (MIRROR=..., such as a day of Debian's snapshots), "
                f"or record these: {commands.invoke('base-image', '--record')}"
            )
        layer = Path(scratch) / "layer.tar"
        with tree.open("rb") as source:
            settle_layer(source, layer, made_at)
        run = {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": ["bash"]}
        return write(output, TAG, [layer], {**run, "Labels": {LABEL: digest(record)}}, architecture(), made_at)


def digest(record: Path = RECORD) -> str:
    """The sha256 of the record."""
    return hashlib.sha256(record.read_bytes()).hexdigest()


def differences(recorded: Mapping[str, Package], found: Mapping[str, Package]) -> Iterator[str]:
    """`name version -> version` for each package that differs from the record."""
    for name in sorted({*recorded, *found}):
        before, now = recorded.get(name), found.get(name)
        if before is None or now is None:
            yield f"{name} {'is new' if before is None else 'is gone'}"
        elif before != now:
            same = before.version == now.version
            yield f"{name} {before.version} -> {'other content' if same else now.version}"


def architecture() -> str:
    """Debian's and Docker's name for this machine's architecture."""
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)


def _debootstrap(tree: Path, mirror: str, made_at: int, say: Say) -> dict[str, Package]:
    """Makes a root file system as a tar at `tree`; returns its packages."""
    if shutil.which("mmdebstrap") is None:
        raise BadInput(
            "mmdebstrap, which makes the base image, is not installed\n"
            "On Debian or Ubuntu: apt-get install mmdebstrap. Or name a Debian image: BASE_IMAGE=..."
        )
    command = [
        *("mmdebstrap", "--variant=minbase", "--components=main", f"--include={','.join(INCLUDE)}"),
        *(f"--dpkgopt={option}" for option in EXCLUDED),
        *(f"--customize-hook={hook}" for hook in HOOKS),
        # mmdebstrap would add the suite's updates, which are not recorded
        f"--setup-hook=sed -i '/ {SUITE} main$/!d' \"$1\"/etc/apt/sources.list",
        *(SUITE, str(tree), *([mirror] if mirror else [])),
    ]
    started = time.monotonic()
    say(f"base image: {SUITE} from {mirror or OWN}: {MAKING} ...")
    done = watched(
        command,
        "  mmdebstrap",
        say,
        seconds=MAKING_SECONDS,
        cwd=tree.parent,
        environment={**os.environ, "SOURCE_DATE_EPOCH": str(made_at)},
    )
    if done.returncode:
        said = [line for line in done.stdout.splitlines() if line.startswith("E: ")] or done.stdout.splitlines()
        asked = f"Is {mirror or OWN} a Debian mirror that answers?"
        raise BadInput(f"mmdebstrap failed: {' '.join(said[:1])[:400]}\n{asked}")
    say(f"base image: its packages are there{took(started)}")
    return {package.name: package for package in _packages((tree.parent / STANZAS).read_text("utf-8"))}


def _packages(stanzas: str) -> Iterator[Package]:
    for stanza in stanzas.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in stanza.splitlines() if ": " in line and line[0] != " ")
        if fields:
            yield Package(fields["Package"], fields["Version"], fields["Architecture"], fields["SHA256"])

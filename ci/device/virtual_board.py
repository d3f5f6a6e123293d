"""An arm64 board emulated on this machine: Debian's root file system under qemu-user, its own sshd on loopback.

Its disk is a folder that survives power-off. Its processes have their own PID namespace, so power-off kills all of them
at once, without a shutdown. It needs root, for chroot and mounts.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from axrun.errors import BadInput, CheckFailed
from ci.device import binfmt, commands, strict_json
from ci.device.place import Address, Board
from ci.device.progress import took, watched

# command -> Debian package
TOOLS = {
    "mmdebstrap": "mmdebstrap",
    "arch-test": "arch-test",
    "ssh-keygen": "openssh-client",
    "unshare": "util-linux",
    "rsync": "rsync",
}
SUITE, EPOCH = "bookworm", "1700000000"
PACKAGES = ("libstdc++6", "openssh-server", "python3", "rsync")
LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
USER, UID = "board", 1000
HOOKS = (
    f'chroot "$1" useradd --create-home --uid {UID} --shell /bin/bash {USER}',
    f"chroot \"$1\" usermod --password '*' {USER}",  # no password is valid, keys are
    'rm -f "$1"/etc/ssh/ssh_host_*',  # each board makes its own
)
MAKING = "two to eight minutes"
MAKING_SECONDS, BOOT_SECONDS, POLL_SECONDS = 1800, 120, 0.1

# Does the work of kernel and init. $1 root file system, $2 address, $3 port, $4 size of a disk for the releases (empty:
# on the root file system), $5 the folder of the releases.
BOOT = f"""
set -e
cd "$1"
mount -t proc -o nosuid,nodev,noexec proc proc
mount -t tmpfs -o mode=0755,nosuid tmpfs dev
for device in full null random tty urandom zero; do touch dev/$device; mount --bind /dev/$device dev/$device; done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=0620 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs dev/shm
mount -t tmpfs -o mode=0755,nosuid,nodev tmpfs run
mkdir run/sshd
if [ -n "$4" ]; then mount -t tmpfs -o "mode=0755,nosuid,nodev,uid={UID},gid={UID},size=$4" tmpfs "$5"; fi
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin chroot . /usr/sbin/sshd -D -e -f /etc/ssh/board_config \
    -p "$3" -o "ListenAddress=$2"
"""
SSHD_CONFIG = f"""HostKey /etc/ssh/ssh_host_ed25519_key
AuthorizedKeysFile .ssh/authorized_keys
AllowUsers {USER}
PermitRootLogin no
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
PidFile none
MaxStartups 64
MaxSessions 64
Subsystem sftp internal-sftp
"""


@dataclass(frozen=True)
class Running:
    """The board's main process, and its start time (clock ticks since boot), which tells a reused pid apart."""

    pid: int
    started: int


def up(
    board: Board, at: Address, disk: str = "", fresh: bool = False, say: Callable[[str], None] = lambda line: None
) -> None:
    """Switches the board on and waits for its sshd; does nothing if it is on.

    `disk` ("64M") gives the releases a disk of that size, empty at every start; `fresh` discards the old disk.
    Raises BadInput if this machine lacks something or the board is on and a disk is requested, CheckFailed if the board
    does not boot.
    """
    if running(board) is not None:
        if disk or fresh:
            raise BadInput(
                f"{board.name} is on, and {'--fresh' if fresh else '--disk'} is for its next start\n"
                f"Switch it off first: {commands.invoke('board.down', '--board', board.argument)}"
            )
        say(f"{board.name} is on: {at.user}@{at.host} port {at.port}")
        return
    _require_machine()
    binfmt.enable()
    archive = root_archive(say)
    rootfs = board.state / "rootfs"
    if fresh:
        shutil.rmtree(rootfs, ignore_errors=True)
    if not rootfs.is_dir():
        _unpack(archive, rootfs)
    _keys(board, at, rootfs)
    if _listens(at):
        raise BadInput(f"{at.host} port {at.port} is in use: choose another address, LG_BOARD_ADDRESS=127.0.65.2")
    releases = rootfs / "home" / USER / board.root
    releases.mkdir(exist_ok=True)
    os.chown(releases, UID, UID)
    log = board.state / "console.log"
    with log.open("wb") as console:
        process = subprocess.Popen(
            [
                *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--uts", "--ipc"),
                *("sh", "-c", BOOT, "boot", str(rootfs), at.host, str(at.port), disk, str(releases)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            start_new_session=True,
        )
    started = _started(process.pid) or 0
    (board.state / "running.json").write_text(json.dumps({"pid": process.pid, "started": started}))
    deadline = time.monotonic() + BOOT_SECONDS
    while not _listens(at):
        if process.poll() is not None or time.monotonic() > deadline:
            lines = log.read_text(errors="replace").strip().splitlines()
            down(board)
            raise CheckFailed(f"{board.name} did not boot: {(lines or ['its console is empty'])[-1]} ({log})")
        time.sleep(POLL_SECONDS)
    say(f"{board.name} is on: {at.user}@{at.host} port {at.port}, an arm64 {SUITE} under qemu-user")


def down(board: Board) -> bool:
    """Cuts the power; returns whether it was on. The disk keeps its content."""
    found = running(board)
    if found is not None:
        with contextlib.ExitStack() as opened:
            inits = _child_handles(found.pid)
            for handle in inits:
                opened.callback(os.close, handle)
            os.kill(found.pid, signal.SIGKILL)  # unshare --kill-child kills everything on the board with it
            deadline = time.monotonic() + BOOT_SECONDS
            # The init process of the board ends after all others on it, and some time after unshare.
            while running(board) is not None or len(select.select(inits, [], [], 0)[0]) < len(inits):
                if time.monotonic() > deadline:
                    raise CheckFailed(f"cannot stop {board.name}: process {found.pid} does not end")
                time.sleep(POLL_SECONDS)
    (board.state / "running.json").unlink(missing_ok=True)
    return found is not None


def _child_handles(pid: int) -> list[int]:
    """Handles of the child processes of a process, readable when one has ended; none if the process has."""
    try:
        words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [os.pidfd_open(int(word)) for word in words]
    except OSError:
        return []


def running(board: Board) -> Running | None:
    """The board's process if it is on. A process that reused its pid does not count."""
    try:
        data = strict_json.read(board.state / "running.json")
        found = Running(int(data["pid"]), int(data["started"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if _started(found.pid) == found.started else None


def root_archive(say: Callable[[str], None] = lambda line: None) -> Path:
    """The root file system as a cached tar, made once per recipe. Raises CheckFailed if it cannot be made."""
    recipe = [
        *("mmdebstrap", "--mode=root", "--arch=arm64", "--variant=essential"),
        f"--include={','.join(PACKAGES)}",
        '--aptopt=APT::Install-Recommends "false"',
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT),
        *(f"--customize-hook={hook}" for hook in HOOKS),
    ]
    key = hashlib.sha256("\n".join([*recipe, SUITE, EPOCH]).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "axc"
    cache.mkdir(parents=True, exist_ok=True)
    archive = cache / f"board-{SUITE}-arm64-{key}.tar"
    with (cache / "board.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not archive.is_file():
            say(f"making an arm64 {SUITE} for the virtual board, once: {MAKING} ...")
            started = time.monotonic()
            _make(recipe, archive, say)
            say(f"{archive}: {archive.stat().st_size / 1e6:.0f} MB{took(started)}")
    return archive


def _make(recipe: list[str], archive: Path, say: Callable[[str], None]) -> None:
    part = archive.with_suffix(".part")
    mirror = os.environ.get("MIRROR")
    try:
        done = watched(
            [*recipe, "--format=tar", SUITE, str(part), *([mirror] if mirror else [])],
            "  mmdebstrap",
            say,
            seconds=MAKING_SECONDS,
            environment={**os.environ, "SOURCE_DATE_EPOCH": EPOCH, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        raise CheckFailed(f"mmdebstrap did not finish within {MAKING_SECONDS} s") from None
    if done.returncode:
        said = [line for line in done.stdout.splitlines() if line.startswith("E:")] or done.stdout.splitlines()[-1:]
        raise CheckFailed(
            f"mmdebstrap failed: {(said or ['it printed nothing'])[0][:300]}\n"
            "It downloads packages from MIRROR, by default Debian's own mirror."
        )
    part.rename(archive)


def _unpack(archive: Path, rootfs: Path) -> None:
    part = rootfs.with_name("rootfs.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    subprocess.run(["tar", "--numeric-owner", "--exclude=./dev/*", "-C", part, "-xf", archive], check=True)
    (part / "etc" / "ssh" / "board_config").write_text(SSHD_CONFIG)
    part.rename(rootfs)


def _keys(board: Board, at: Address, rootfs: Path) -> None:
    """Makes the host key and the user's key at the first start, and installs them."""
    board.state.chmod(0o700)
    host_key = board.state / "ssh_host_ed25519_key"
    for key in (host_key, at.keyfile):
        if not key.is_file():
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", board.name, "-f", str(key)],
                stdin=subprocess.DEVNULL,
                check=True,
            )
    inside = rootfs / "etc" / "ssh" / host_key.name
    shutil.copyfile(host_key, inside)
    inside.chmod(0o600)
    public = host_key.with_suffix(".pub").read_text().split()[:2]
    (board.state / "known_hosts").write_text(f"[{at.host}]:{at.port} {' '.join(public)}\n")
    folder = rootfs / "home" / USER / ".ssh"
    folder.mkdir(mode=0o700, exist_ok=True)
    authorized = folder / "authorized_keys"
    shutil.copyfile(at.keyfile.with_suffix(".pub"), authorized)
    for path, mode in ((folder, 0o700), (authorized, 0o600)):
        path.chmod(mode)
        os.chown(path, UID, UID)


def _require_machine() -> None:
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if missing:
        raise BadInput(f"the virtual board needs more packages: apt-get install {' '.join(missing)}")
    if os.geteuid() != 0:
        raise BadInput("the virtual board needs chroot and mounts: run this as root")


def _listens(at: Address) -> bool:
    """Whether an SSH server answers there."""
    try:
        with socket.create_connection((at.host, at.port), timeout=5) as link:
            return link.recv(4) == b"SSH-"
    except OSError:
        return False


def _started(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot (proc(5), stat field 22); None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])

"""What a night or a deploy holds of a board, noted as it takes it: who is killed leaves a note of what to clear.

The notes are STATE/held/MARK.json in the board's state folder, beside MARK.lock, whose lock the kernel frees when the
holder ends: from within a container too, that tells the living from the dead. Everything that a holder starts has the
mark in its environment, daemons in sessions of their own included. Processes are found by that mark, never by a number
that another process may have by now.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO

from axrun.errors import BadInput, Failure
from ci.device import place, strict_json
from ci.device.place import Board, Say, quiet

MARK = "AXC_HOLDER"  # the environment variable of the mark, and the label of containers (ci/container/engine.py)
FORM = re.compile(r"[0-9a-f]{32}")
TEMPORARY = "axc-held-"  # prefix of a holder's folder of temporary files
END_SECONDS = 10.0  # for a killed process to end
ROUNDS = 20  # of looking for processes: those that fork while they are being killed


@dataclass
class Note:
    """One holder. `pid` is for a reader: nothing is done by it.

    `power`: it switched the board on. `reservation` is labgrid's token in a farm, `temporary` its folder of temporary
    files, `worktrees` the checkouts that it made, `stage` what it was doing.
    """

    what: str
    since: str
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    pid: int = field(default_factory=os.getpid)
    power: bool = False
    reservation: str = ""
    temporary: str = ""
    stage: str = ""
    worktrees: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """For a reader: what it was, since when, in which stage."""
        return f"{self.what} (pid {self.pid}, since {self.since}{f', in {self.stage}' if self.stage else ''})"


class Holding:
    """A note that is kept up to date while something is held."""

    def __init__(self, board: Board, what: str) -> None:
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.note = Note(what, now)
        self._file = _folder(board) / f"{self.note.mark}.json"
        self._told = None if board.in_farm else board.state / "lock"  # what place.hold says of its holder
        self._lock: IO[bytes] | None = None

    def variables(self, *, temporary: bool = True) -> dict[str, str]:
        """For the environment of everything that the holder starts; `temporary`: its files go when the holder does."""
        return {MARK: self.note.mark, **({"TMPDIR": self.note.temporary} if temporary else {})}

    def begin(self) -> None:
        self.note.temporary = tempfile.mkdtemp(prefix=TEMPORARY)
        self._write()

    def stage(self, name: str, *, power: bool = False) -> None:
        """Before a stage begins; `power`: it switches the board on."""
        self.note.stage, self.note.power = name, self.note.power or power
        self._write()

    def reserved(self, token: str) -> None:
        self.note.reservation = token
        self._write()

    def worktree(self, path: Path) -> None:
        """Before a checkout is made there."""
        self.note.worktrees.append(str(path))
        self._write()

    def end(self) -> None:
        """Everything was let go."""
        shutil.rmtree(self.note.temporary or "/nonexistent", ignore_errors=True)
        _forget(self._file)
        if self._lock:
            self._lock.close()

    def _write(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self._lock is None:
            self._lock = self._file.with_suffix(".lock").open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        fresh = self._file.with_suffix(".new")
        fresh.write_text(json.dumps(asdict(self.note)) + "\n", "utf-8")
        os.replace(fresh, self._file)
        if self._told and self.note.temporary:  # begun: the board is ours
            self._told.write_text(f"{self.note.title}\n", "utf-8")


@contextlib.contextmanager
def hold(board: Board, what: str, seconds: int = 0, say: Say = quiet) -> Iterator[Holding | None]:
    """As place.hold, with a note; what a dead holder left is cleared first, the board's power alone excepted.

    None within somebody else's hold. Raises BadInput naming who has the board.
    """
    if os.environ.get(place.HELD) == str(board.state):
        yield None
        return
    for line in clear(board):
        say(line)
    holding = Holding(board, what)
    try:
        with place.hold(board, seconds, say, holding.reserved):
            holding.begin()
            yield holding
    finally:
        holding.end()


@contextlib.contextmanager
def alone(board: Board, anyway: bool = False, say: Say = quiet) -> Iterator[None]:
    """As place.hold, for a command that changes the board or keeps it busy.

    `anyway`: although somebody holds it, who is named. Raises BadInput naming who does, and how to go on all the same.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(place.hold(board))
        except place.Held as refusal:
            if not anyway:
                raise BadInput(
                    f"{board.name} is held by {refusal.who}: nothing was touched\n"
                    "Wait for it, or end it. --even-if-held goes on all the same, and what it does there may fail."
                ) from None
            say(f"note: {board.name} is held by {refusal.who}: what it does there may fail now")
        yield


@contextlib.contextmanager
def marked(holding: Holding | None) -> Iterator[None]:
    """What this process starts meanwhile has the mark too."""
    with place.environment(holding.variables() if holding else {}):
        yield


def free(board: Board) -> Iterator[str]:
    """Clears what dead holders left, the power included, and says each thing; nothing where nothing was held.

    Raises BadInput, before anything is touched, when its holder is alive; in a farm that has another board.
    """
    notes = read(board)
    for note in [note for note in notes if alive(board, note)]:
        if not board.in_farm:
            raise BadInput(
                f"{board.name} is held by {note.title}, which is running: nothing was touched\n"
                f"Wait for it, or end it: kill {note.pid}"
            )
        notes.remove(note)
        yield f"{note.title} is running and was left alone"
    with contextlib.nullcontext() if board.in_farm else place.hold(board):
        for note in notes:
            yield f"held by {note.title}, which was killed:"
            yield from (f"  {line}" for line in _release(board, note, power=True))
    if not notes:
        yield f"nothing of {board.name} was held"


def clear(board: Board) -> Iterator[str]:
    """Clears what dead holders left, but leaves the board's power as it is: a deploy needs it, a night cycles it."""
    for note in read(board):
        if not alive(board, note):
            yield f"{note.title} was killed; clearing what it left"
            yield from (f"  {line}" for line in _release(board, note, power=False))


def read(board: Board) -> list[Note]:
    """The notes that lie in a board's state folder; what is none is removed."""
    found = []
    for file in sorted(_folder(board).glob("*.json")):
        try:
            values = strict_json.read(file)
            note = Note(**{entry.name: values[entry.name] for entry in fields(Note)})
        except (OSError, ValueError, TypeError, KeyError):
            _forget(file)  # no note of ours: those are renamed into place whole
            continue
        if FORM.fullmatch(note.mark) and file.stem == note.mark:
            found.append(note)
    return found


def alive(board: Board, note: Note) -> bool:
    """Whether a holder still runs: it has the lock beside its note."""
    try:
        with (_folder(board) / f"{note.mark}.lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _release(board: Board, note: Note, power: bool) -> Iterator[str]:
    """Everything of one dead holder, in the order in which it can be let go."""
    on = _emulator(board)
    yield from (f"{line}: ended" for line in end(note.mark, {on} if on else set()))
    yield from _containers(note.mark)
    if note.reservation and board.in_farm:
        with place.environment({"LG_TOKEN": note.reservation, "LG_PLACE": "+"}):
            if power and note.power:
                yield from _switch_off(board)
            yield from _let_go(board, note.reservation)
    elif power:
        if note.stage in ("deploy", "measure"):
            yield from _incoming(board)
        if note.power:
            yield from _switch_off(board)
    elif note.power and (on or not board.emulated):
        yield f"the power of {board.name} stays as it is"
    yield from _folders(note)
    _forget(_folder(board) / f"{note.mark}.json")


def _switch_off(board: Board) -> Iterator[str]:
    try:
        if board.emulated:
            from ci.device import virtual_board

            yield f"the power of {board.name} was {'on: cut' if virtual_board.down(board) else 'off already'}"
        else:
            with place.power(board) as switch:
                switch.off()
            yield f"the power of {board.name}: switched off"
    except Failure as failure:
        yield f"the power of {board.name} could not be switched off: {str(failure).partition(chr(10))[0]}"


def _incoming(board: Board) -> Iterator[str]:
    """Half a transfer on the board, and the process there that holds its lock."""
    from ci.device import power
    from ci.device.connection import Connection

    try:
        at = place.address(board)
        if not power.greets(at):
            yield f"{board.name} does not answer: half a transfer may lie on it, which the next deploy ends or removes"
            return
        with Connection(board, at) as link:
            link.call("lock", owner=place.owner())
            there = link.call("incoming")
            link.call("drop")
        yield f"the lock of the releases on {board.name} is free"
        if there:
            yield f"half a transfer on {board.name}, {there / 1e6:.1f} MB: removed"
    except Failure as failure:
        yield f"what lies on {board.name} was not looked at: {str(failure).partition(chr(10))[0]}"


def _let_go(board: Board, token: str) -> Iterator[str]:
    for what, words in (("the place", ("-p", "+", "unlock")), ("the reservation", ("cancel-reservation", token))):
        try:
            place.client(board, *words)
            yield f"{what} of reservation {token}: let go"
        except Failure as failure:
            yield f"{what} of reservation {token} is gone: {str(failure).partition(chr(10))[0]}"


def _containers(mark: str) -> Iterator[str]:
    """Containers that a build of the holder runs in, where a Docker daemon answers."""
    if not (os.environ.get("DOCKER_HOST") or Path("/var/run/docker.sock").exists()):
        return
    from docker.errors import DockerException

    from ci.container.daemon import connect

    try:
        for container in connect().containers.list(all=True, filters={"label": f"{MARK}={mark}"}):
            container.remove(force=True)
            yield f"container {container.short_id}: removed"
    except (Failure, DockerException, OSError) as error:
        yield f"no Docker daemon told of containers: {str(error).partition(chr(10))[0][:200]}"


def _folders(note: Note) -> Iterator[str]:
    temporary = Path(note.temporary)
    if temporary.name.startswith(TEMPORARY) and temporary.is_dir() and temporary.stat().st_uid == os.getuid():
        shutil.rmtree(temporary, ignore_errors=True)
        yield f"temporary files in {temporary}: removed"
    for path in note.worktrees:
        if (Path(path) / ".git").is_file():
            command = ["git", "worktree", "remove", "--force", "--force", path]
            subprocess.run(command, cwd=place.ROOT, capture_output=True, timeout=60, check=False)
            yield f"checkout {path}: {'not removed' if Path(path).exists() else 'removed'}"


def end(mark: str, but: set[int] | None = None) -> list[str]:
    """Kills the processes that have a mark, `but` a few and this one; returns what they were."""
    ended = []
    for _ in range(ROUNDS):
        there = [pid for pid in _pids(mark) if pid not in (but or set())]
        if not there:
            break
        for pid in there:
            what = _command(pid)
            if _kill(pid, mark):
                ended.append(f"process {pid} ({what})")
    return ended


def _kill(pid: int, mark: str) -> bool:
    """Whether this very process was killed: its handle is taken before its mark is read, so that no other is hit."""
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        if not _has(pid, mark):
            return False
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        select.select([handle], [], [], END_SECONDS)  # readable when it has ended
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _pids(mark: str) -> list[int]:
    pids = [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if pid != os.getpid() and _has(pid, mark)]


def _has(pid: int, mark: str) -> bool:
    try:
        return f"{MARK}={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _command(pid: int) -> str:
    try:
        text = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
    except OSError:
        return "ended"
    return "".join(c if c.isprintable() else "�" for c in text[:100])


def _emulator(board: Board) -> int | None:
    """The process that is an emulated board: whether it ends is a question of power."""
    if not board.emulated:
        return None
    from ci.device import virtual_board

    found = virtual_board.running(board)
    return found.pid if found else None


def _forget(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.with_suffix(".lock").unlink(missing_ok=True)


def _folder(board: Board) -> Path:
    return board.state / "held"

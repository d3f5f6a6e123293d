"""Records the resources that a night or a deploy holds, so that a later command can clean up after a killed holder.

Each holder has a note STATE/held/MARK.json in the board's state folder, and MARK.lock next to it. The kernel frees the
lock when the holder ends, so it tells whether the holder is alive, even across containers. Every process that a holder
starts, daemons included, has the mark in its environment. The cleanup finds processes by this mark, never by a pid,
which may have been reused.
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
ROUNDS = 20  # repeated scans, for processes that fork while being killed


@dataclass
class Note:
    """One holder and its resources. `pid` is only for display.

    `power`: it switched the board on. `reservation` is labgrid's token in a farm, `temporary` its folder of temporary
    files, `worktrees` its git worktrees, `stage` its current stage.
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
        """What holds the board, since when, in which stage."""
        return f"{self.what} (pid {self.pid}, since {self.since}{f', in {self.stage}' if self.stage else ''})"


class Holding:
    """The note of this process, kept up to date while it holds the board."""

    def __init__(self, board: Board, what: str) -> None:
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.note = Note(what, now)
        self._file = _folder(board) / f"{self.note.mark}.json"
        self._told = None if board.in_farm else board.state / "lock"  # the lock file, whose text names the holder
        self._lock: IO[bytes] | None = None

    def variables(self, *, temporary: bool = True) -> dict[str, str]:
        """Environment variables for child processes; with `temporary`, their TMPDIR is removed with the holder."""
        return {MARK: self.note.mark, **({"TMPDIR": self.note.temporary} if temporary else {})}

    def begin(self) -> None:
        self.note.temporary = tempfile.mkdtemp(prefix=TEMPORARY)
        self._write()

    def stage(self, name: str, *, power: bool = False) -> None:
        """Call before a stage begins; `power`: it switches the board on."""
        self.note.stage, self.note.power = name, self.note.power or power
        self._write()

    def reserved(self, token: str) -> None:
        self.note.reservation = token
        self._write()

    def worktree(self, path: Path) -> None:
        """Call before a git worktree is made there."""
        self.note.worktrees.append(str(path))
        self._write()

    def end(self) -> None:
        """Call after everything was released."""
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
        if self._told and self.note.temporary:  # after begin(): the board is ours
            self._told.write_text(f"{self.note.title}\n", "utf-8")


@contextlib.contextmanager
def hold(board: Board, what: str, seconds: int = 0, say: Say = quiet) -> Iterator[Holding | None]:
    """place.hold with a note. Cleans up after dead holders first, except for the board's power.

    Yields None if a parent process already holds the board. Raises BadInput naming the holder.
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
    """place.hold for a command that changes the board or keeps it busy.

    With `anyway`, it goes on although somebody holds the board, and names the holder. Otherwise raises BadInput with
    the holder and the flag.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(place.hold(board))
        except place.Held as refusal:
            if not anyway:
                raise BadInput(
                    f"{board.name} is held by {refusal.who}: nothing was changed\n"
                    "Wait for it, or end it. --even-if-held goes on anyway, which can break the holder's run."
                ) from None
            say(f"note: {board.name} is held by {refusal.who}, whose run may fail now")
        yield


@contextlib.contextmanager
def marked(holding: Holding | None) -> Iterator[None]:
    """Sets the mark in this process's environment, for its children."""
    with place.environment(holding.variables() if holding else {}):
        yield


def free(board: Board) -> Iterator[str]:
    """Cleans up after dead holders, power included, and yields a line for each action.

    Raises BadInput, before changing anything, if a holder is alive. In a farm, living holders are skipped: they have
    other boards.
    """
    notes = read(board)
    for note in [note for note in notes if alive(board, note)]:
        if not board.in_farm:
            raise BadInput(
                f"{board.name} is held by {note.title}, which is running: nothing was changed\n"
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
    """Cleans up after dead holders, except for the board's power: a deploy needs it, a night cycles it anyway."""
    for note in read(board):
        if not alive(board, note):
            yield f"{note.title} was killed; clearing what it left"
            yield from (f"  {line}" for line in _release(board, note, power=False))


def read(board: Board) -> list[Note]:
    """The notes in a board's state folder; invalid files are removed."""
    found = []
    for file in sorted(_folder(board).glob("*.json")):
        try:
            values = strict_json.read(file)
            note = Note(**{entry.name: values[entry.name] for entry in fields(Note)})
        except (OSError, ValueError, TypeError, KeyError):
            _forget(file)  # not ours: our notes are renamed into place complete
            continue
        if FORM.fullmatch(note.mark) and file.stem == note.mark:
            found.append(note)
    return found


def alive(board: Board, note: Note) -> bool:
    """Whether a holder still runs: then it has the lock next to its note."""
    try:
        with (_folder(board) / f"{note.mark}.lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _release(board: Board, note: Note, power: bool) -> Iterator[str]:
    """Releases all resources of one dead holder, in the order of their dependencies."""
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
    """Removes a partial transfer on the board, and frees its lock."""
    from ci.device import power
    from ci.device.connection import Connection

    try:
        at = place.address(board)
        if not power.greets(at):
            yield f"{board.name} does not answer: the next deploy resumes or removes a partial transfer"
            return
        with Connection(board, at) as link:
            link.call("lock", owner=place.owner())
            there = link.call("incoming")
            link.call("drop")
        yield f"the lock of the releases on {board.name} is free"
        if there:
            yield f"partial transfer on {board.name}, {there / 1e6:.1f} MB: removed"
    except Failure as failure:
        yield f"cannot clean up on {board.name}: {str(failure).partition(chr(10))[0]}"


def _let_go(board: Board, token: str) -> Iterator[str]:
    for what, words in (("the place", ("-p", "+", "unlock")), ("the reservation", ("cancel-reservation", token))):
        try:
            place.client(board, *words)
            yield f"{what} of reservation {token}: released"
        except Failure as failure:
            yield f"{what} of reservation {token} is gone: {str(failure).partition(chr(10))[0]}"


def _containers(mark: str) -> Iterator[str]:
    """Removes the holder's build containers, if a Docker daemon answers."""
    if not (os.environ.get("DOCKER_HOST") or Path("/var/run/docker.sock").exists()):
        return
    from docker.errors import DockerException

    from ci.container.daemon import connect

    try:
        for container in connect().containers.list(all=True, filters={"label": f"{MARK}={mark}"}):
            container.remove(force=True)
            yield f"container {container.short_id}: removed"
    except (Failure, DockerException, OSError) as error:
        yield f"cannot list Docker containers: {str(error).partition(chr(10))[0][:200]}"


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
    """Kills the processes with a mark, except those in `but` and this one; returns their descriptions."""
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
    """Kills a process if it has the mark. Opens a pidfd before checking the mark, so a reused pid is never hit."""
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
    """The main process of an emulated board, which counts as its power, not as a stray process."""
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

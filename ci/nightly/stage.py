"""Runs one stage of a night: a command with a time limit and a console log; no process of it survives.

Every command gets a session of its own. Processes that it leaves behind, even daemons in another session, are
reparented to this process, a subreaper (prctl(2), PR_SET_CHILD_SUBREAPER), and killed at the end of the stage.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from axrun.errors import BadInput
from ci.device import progress

PR_SET_CHILD_SUBREAPER = 36
GRACE = 10.0  # seconds between a polite signal and SIGKILL
MOST_REASON = 400  # characters
TAIL = 60  # lines of a console that a report shows
POLL = 0.1  # seconds
HANDED_IN = "bundle handed in"  # the stage in place of a build, for a bundle that was built elsewhere
TIMED_OUT = 124  # exit code of timeout(1)
INTERRUPTED = 130
KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)
OUTCOMES = {0: "done", **dict.fromkeys(KILLED, "killed"), TIMED_OUT: "timed out", INTERRUPTED: "interrupted"}


@dataclass(frozen=True)
class Stage:
    """A finished stage: exit code, seconds, time limit.

    `reason` is empty on success. `excused` says why a failure does not count: retried, quarantined.
    """

    name: str
    code: int
    seconds: float
    limit: float
    reason: str
    console: Path
    excused: str = ""

    @property
    def failed(self) -> bool:
        return self.code != 0 and not self.excused

    @property
    def outcome(self) -> str:
        if self.name == HANDED_IN and not self.failed:
            return "taken"
        if self.excused:
            return self.excused
        return OUTCOMES.get(self.code, "failed")

    def tail(self) -> str:
        """The last lines of its console, printable."""
        return "\n".join(_lines(self.console)[-TAIL:])


def adopt_orphans() -> None:
    """Makes this process the subreaper of its descendants. Linux only; elsewhere orphans go to init."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def run(
    name: str,
    command: Sequence[str],
    *,
    limit: float,
    console: Path,
    cwd: Path,
    environment: Mapping[str, str] | None = None,
    leaves: bool = False,
    stop: Callable[[], str] = lambda: "",
    say: Callable[[str], None] = lambda line: None,
) -> Stage:
    """Runs a command until it ends, times out, or `stop` returns a reason.

    Every progress.EVERY seconds, `say` gets the elapsed time and the last line of output. `leaves`: processes left
    behind may go on (an emulated board that was switched on). Raises BadInput if the command cannot be started.
    """
    before = set(children(os.getpid()))
    started = time.monotonic()
    code, memory = 0, Memory()
    with console.open("wb") as stream:
        try:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env=None if environment is None else {**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise BadInput(f"{name}: cannot start {command[0]}: {error.strerror}") from None
        beat = _heartbeat(name, console, say, started)
        try:
            code = _wait(process, limit, stop, (memory.look, beat))
        finally:
            end(process)
            if not leaves:
                sweep(before)
    reason = ""
    if code == TIMED_OUT:
        reason = f"{name} did not end within {limit:.0f} s; last output: {last_line(console)}"
    elif code == INTERRUPTED and stop():
        reason = stop()
    elif code in KILLED:
        reason = memory.reason(name, last_line(console))
    elif code:
        reason = last_error(console) or f"{name} ended with exit code {code} and printed nothing"
    return Stage(name, code, time.monotonic() - started, limit, reason[:MOST_REASON], console)


def _heartbeat(name: str, console: Path, say: Callable[[str], None], started: float) -> Callable[[], None]:
    """A callback for the polling loop that reports progress every progress.EVERY seconds."""
    told = started

    def beat() -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= progress.EVERY:
            told = now
            last = last_line(console)[:120]
            say(f"  {name}: {now - started:.0f} s" + (f", {last}" if last else ""))

    return beat


class Memory:
    """Tracks the machine's available memory and its OOM kills while a command runs."""

    def __init__(self) -> None:
        self.least = self.first = _available()
        self._kills = _kills()

    def look(self) -> None:
        self.least = min(self.least, _available())

    def reason(self, name: str, said: str) -> str:
        """Explains a SIGKILL that did not come from us."""
        kills = _kills() - self._kills
        left = f"{self.first >> 20} MB of memory were available at its start, {self.least >> 20} MB at the lowest point"
        why = "by the kernel, out of memory" if kills else "by another process or the kernel, perhaps out of memory"
        last = f"; last output: {said}" if said else ""
        return f"{name} was killed {why}: {left}{last}\nGive it more memory, or less work at a time: PARALLEL=1."


def _available() -> int:
    """Available memory in bytes; 0 if unknown."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text(Path("/proc/meminfo")), re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def _kills() -> int:
    """The number of OOM kills so far, on this machine and in this container."""
    texts = _text(Path("/proc/vmstat")), _text(Path("/sys/fs/cgroup/memory.events"))
    return sum(int(count) for text in texts for count in re.findall(r"^oom_kill (\d+)$", text, re.MULTILINE))


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8", "replace")
    except OSError:
        return ""


def _wait(
    process: subprocess.Popen[bytes], limit: float, stop: Callable[[], str], looks: Sequence[Callable[[], None]] = ()
) -> int:
    deadline = time.monotonic() + limit
    while True:
        for look in looks:
            look()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(POLL)
        if stop():
            return INTERRUPTED
        if time.monotonic() > deadline:
            return TIMED_OUT


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a command and its session: SIGINT, then SIGTERM, then SIGKILL."""
    for number, patience in ((signal.SIGINT, GRACE), (signal.SIGTERM, GRACE / 2), (signal.SIGKILL, GRACE)):
        if process.poll() is not None:
            break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def sweep(before: set[int]) -> list[int]:
    """Kills the children of this process that are not in `before`, and their descendants; returns their pids."""
    found: list[int] = []
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline:
        strays = [pid for pid in children(os.getpid()) if pid not in before]
        if not strays:
            break
        for stray in strays:
            for pid in [*descendants(stray), stray]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(stray, os.WNOHANG)
        found += [pid for pid in strays if pid not in found]
        time.sleep(0.05)
    return found


def children(parent: int) -> list[int]:
    """The processes whose parent is `parent`, zombies included; empty without /proc."""
    return [pid for pid, of in _parents() if of == parent]


def descendants(ancestor: int) -> list[int]:
    """Children, their children and so on."""
    table = list(_parents())
    found, waiting = [], [ancestor]
    while waiting:
        current = waiting.pop()
        below = [pid for pid, of in table if of == current and pid not in found]
        found += below
        waiting += below
    return found


def last_error(console: Path) -> str:
    """The error message of a command: the last `error: ...` with the lines after it, or else the last line."""
    lines = _lines(console)
    for place in range(len(lines) - 1, -1, -1):
        if lines[place].lower().startswith("error: "):
            return lines[place][len("error: ") :].strip()
    return last_line(console)


def last_line(console: Path) -> str:
    lines = [line.strip() for line in _lines(console) if line.strip()]
    return lines[-1] if lines else ""


def _parents() -> Iterator[tuple[int, int]]:
    """(pid, parent's pid) of every process: fields 1 and 4 of /proc/PID/stat; field 2 may contain anything."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            yield int(entry.name), int((entry / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()[1])


def _lines(console: Path) -> list[str]:
    """The last 64 KB of a console as printable lines."""
    with console.open("rb") as stream:
        stream.seek(max(0, console.stat().st_size - (1 << 16)))
        text = stream.read().decode("utf-8", "replace")
    shown = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return ["".join(c if c.isprintable() or c == "\t" else "�" for c in line) for line in shown]

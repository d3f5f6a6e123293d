"""A stage: end, time limit, reason, and no process left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from axrun.errors import BadInput
from ci.nightly import stage

ROOT = Path(__file__).resolve().parents[2]
WAIT = 300.0  # seconds for what takes no time on an idle machine

# A daemon as ssh -f or an sshd makes one: a session of its own, its parent gone, deaf to every request to end.
DAEMON = """
import os, signal, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        open(sys.argv[1] + ".new", "w").write(str(os.getpid()))
        os.rename(sys.argv[1] + ".new", sys.argv[1])
        time.sleep(3600)
    os._exit(0)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.01)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + WAIT
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)
    return true()


def hold(folder: Path, code: str, *words: str, limit: float = WAIT) -> stage.Stage:
    command = [sys.executable, "-u", "-c", textwrap.dedent(code), *words]
    return stage.run("build", command, limit=limit, console=folder / "build.log", cwd=folder)


def in_a_process(code: str, *words: str) -> subprocess.Popen[str]:
    """A night of its own, so that orphans come to it and not to the test."""
    start = "import sys; from pathlib import Path; from ci.nightly import stage; stage.adopt_orphans()\n"
    return subprocess.Popen(
        [sys.executable, "-u", "-c", start + textwrap.dedent(code), *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_command_that_ends_well_has_no_reason(tmp_path: Path) -> None:
    done = hold(tmp_path, "print('one'); print('two')")
    assert (done.code, done.reason, done.outcome, done.failed) == (0, "", "done", False)
    assert done.tail() == "one\ntwo\n"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("print('error: no room on the board'); print('Make room.'); raise SystemExit(2)", "no room on the board"),
        ("print('error: first'); print('error: last'); raise SystemExit(1)", "last"),
        ("print('it broke'); raise SystemExit(1)", "it broke"),
        ("raise SystemExit(3)", "build ended with exit code 3 and printed nothing"),
        ("print('error: \\x1b[31mred\\x07'); raise SystemExit(1)", "�[31mred�"),
        ("import sys; sys.stdout.buffer.write(b'error: \\xff\\n'); raise SystemExit(1)", "�"),
        ("print('error: ' + 'x' * 100_000); raise SystemExit(1)", "x" * stage.MOST_REASON),
    ],
)
def test_the_reason_is_the_last_error_of_the_command(code: str, reason: str, tmp_path: Path) -> None:
    done = hold(tmp_path, code)
    assert done.failed
    assert done.reason == reason


def test_a_killed_command_reports_available_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, signal; print('layer 3 of 24', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    done = hold(tmp_path, code)
    assert (done.code, done.outcome) == (-9, "killed")
    said = r"build was killed by another process or the kernel, perhaps out of memory: \d+ MB of memory were available "
    assert re.match(said + r"at its start, \d+ MB at the lowest point; last output: layer 3 of 24\n", done.reason)
    assert hold(tmp_path, "raise SystemExit(137)").outcome == "killed"
    kills = iter((7, 8))
    monkeypatch.setattr(stage, "_kills", lambda: next(kills))
    assert hold(tmp_path, code).reason.startswith("build was killed by the kernel, out of memory: ")


class Clock:
    """Jumps past the stage's limit once `passes` is true, however long the command took to start."""

    def __init__(self, passes: Callable[[], bool]) -> None:
        self.passes = passes
        self.sleep, self.time = time.sleep, time.time

    def monotonic(self) -> float:
        return time.monotonic() + (2 * WAIT if self.passes() else 0)


def test_a_command_beyond_its_limit_is_ended_with_all_of_its_session(tmp_path: Path) -> None:
    code = """
        import os, signal, time
        signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = os.fork() or os.getpid()
        open(f"pid.{os.getpid()}", "w").close()
        os.write(1, b"waiting for the board\\n")  # at once: print writes the end of the line apart
        open(f"said.{os.getpid()}", "w").close(); time.sleep(3600)
    """
    grace = pytest.MonkeyPatch()
    with grace.context() as patch:
        patch.setattr(stage, "GRACE", 0.5)
        patch.setattr(stage, "time", Clock(lambda: len(list(tmp_path.glob("said.*"))) == 2))
        done = hold(tmp_path, code)
    assert (done.code, done.outcome) == (stage.TIMED_OUT, "timed out")
    assert done.reason == "build did not end within 300 s; last output: waiting for the board"
    pids = [int(path.suffix[1:]) for path in tmp_path.glob("pid.*")]
    assert len(pids) == 2
    assert until(lambda: not any(alive(pid) for pid in pids))


def test_a_command_is_asked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
        import time
        try:
            open("runs", "w").close(); time.sleep(3600)
        except KeyboardInterrupt:
            print("unlocked")
    """
    monkeypatch.setattr(stage, "time", Clock((tmp_path / "runs").exists))
    assert hold(tmp_path, code).tail() == "unlocked\n"


@pytest.mark.parametrize("leaves", [False, True])
def test_a_daemon_ends_with_its_stage_unless_it_is_meant_to_stay(leaves: bool, tmp_path: Path) -> None:
    code = f"""
        folder = Path(sys.argv[1])
        command = [sys.executable, "-c", sys.argv[2], str(folder / "pid")]
        done = stage.run("up", command, limit={WAIT}, console=folder / "log", cwd=folder, leaves={leaves})
        pid = int((folder / "pid").read_text())
        print(done.code, pid in stage.children(stage.os.getpid()), flush=True)
        later = stage.run("next", ["true"], limit={WAIT}, console=folder / "log", cwd=folder)
        print(pid in stage.children(stage.os.getpid()), pid in stage.sweep(set()), flush=True)
    """
    night = in_a_process(code, str(tmp_path), DAEMON)
    out, _ = night.communicate(timeout=WAIT)
    assert out.splitlines() == [f"0 {leaves}", f"{leaves} {leaves}"]
    assert until(lambda: not alive(int((tmp_path / "pid").read_text())))


def test_a_night_that_is_to_stop_ends_its_stage(tmp_path: Path) -> None:
    code = f"""
        import signal
        seen = []
        signal.signal(signal.SIGTERM, lambda *_: seen.append("SIGTERM ended the night"))
        stop = lambda: "".join(seen)
        folder = Path(sys.argv[1])
        command = [sys.executable, "-c", sys.argv[2] + "; time.sleep(3600)", str(folder / "pid")]
        done = stage.run("measure", command, limit={WAIT}, console=folder / "log", cwd=folder, stop=stop)
        print(done.outcome, done.reason, stage.children(stage.os.getpid()))
    """
    night = in_a_process(code, str(tmp_path), DAEMON.rstrip() + "\nimport time")
    assert until((tmp_path / "pid").exists)
    night.send_signal(signal.SIGTERM)
    out, _ = night.communicate(timeout=WAIT)
    assert out == "interrupted SIGTERM ended the night []\n"
    assert not alive(int((tmp_path / "pid").read_text()))


def test_a_missing_command_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="power: cannot start no-such-tool: No such file or directory"):
        stage.run("power", ["no-such-tool"], limit=1, console=tmp_path / "log", cwd=tmp_path)


def test_descendants_are_found_below_children(tmp_path: Path) -> None:
    code = "import os, time\nos.fork() or os.fork()\nopen(f'pid.{os.getpid()}', 'w').close()\ntime.sleep(3600)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, start_new_session=True)
    try:
        assert until(lambda: len(list(tmp_path.glob("pid.*"))) == 3)
        mine = {int(path.suffix[1:]) for path in tmp_path.glob("pid.*")} - {process.pid}
        assert set(stage.descendants(process.pid)) == mine
        assert process.pid in stage.children(os.getpid())
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(WAIT)

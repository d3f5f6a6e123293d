"""ssh to a board: its command line, explanations of its errors, port forwards, and child processes that die with us."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence

from axrun.errors import CheckFailed
from ci.device.place import SSH, Address, Board

CONNECT_SECONDS, REQUEST_SECONDS = 15, 120
FAILED = 255  # ssh's exit code if the connection failed or broke

# ssh's messages (https://man.openbsd.org/ssh) and our explanations; {at} is user@host port
SSH_SAYS = (
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED|host key for .* has changed",
        "the host key of {at} is not the one in {known_hosts}\n"
        "Either another machine answers or the board was reinstalled: remove its line there only if you know it was.",
    ),
    (
        r"No .* host key is known|Host key verification failed",
        "the host key of {at} is not in {known_hosts}\n"
        "Compare it with the board's own (ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub), then add it:\n"
        "ssh-keyscan -t ed25519 -p {port} {host} >> {known_hosts}",
    ),
    (
        r"Permission denied",
        "{at} does not accept the key {keyfile}\nAdd {keyfile}.pub to the board's ~/.ssh/authorized_keys.",
    ),
    (
        r"Could not resolve|[Cc]onnection (timed out|refused|closed|reset)|No route|unreachable|kex_exchange|timeout",
        "{at} cannot be reached: {said}\nIs the board on and on the network, and its address right?",
    ),
)


class Lost(CheckFailed):
    """The connection ended, or the board did not answer in time."""


def command(at: Address, *options: str) -> list[str]:
    """The ssh command for an address, without the host. It checks the host key and never prompts."""
    return [
        *(str(SSH), "-x", *(options or ("-T",)), "-o", f"ConnectTimeout={CONNECT_SECONDS}"),
        *("-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=6"),
        *("-i", str(at.keyfile), "-p", str(at.port), "-l", at.user),
    ]


def environment(board: Board) -> dict[str, str]:
    return {**os.environ, **board.variables(), "LC_ALL": "C"}


def meaning(board: Board, at: Address, said: str) -> str:
    """An explanation of ssh's message for the user; empty for an unknown message."""
    for pattern, text in SSH_SAYS:
        if re.search(pattern, said):
            return text.format(
                at=f"{at.user}@{at.host} port {at.port}",
                host=at.host,
                port=at.port,
                keyfile=at.keyfile,
                known_hosts=board.state / "known_hosts",
                said=last_line(said),
            )
    return ""


@contextlib.contextmanager
def forwarded(board: Board, at: Address, there: int, here: int = 0) -> Iterator[int]:
    """Forwards a local loopback port (`here`, or a free one) to the board's port `there`.

    Raises Lost if that fails. The forward ends with the block, and with this process.
    """
    here = here or _free_port()
    words = ["-o", "ExitOnForwardFailure=yes", "-N", "-L", f"127.0.0.1:{here}:127.0.0.1:{there}", at.host]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [*mortal(), *command(at), *words],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            env=environment(board),
            start_new_session=True,  # Ctrl-C goes to this side only, which then stops it
        )
        try:
            deadline = time.monotonic() + CONNECT_SECONDS + REQUEST_SECONDS
            while not _listens(here):
                if process.poll() is not None or time.monotonic() > deadline:
                    said.seek(0)
                    text = said.read(1 << 16).decode("utf-8", "replace")
                    why = f"cannot forward a port of {board.name}: {last_line(text)}\nDoes its sshd allow it?"
                    raise Lost(meaning(board, at, text) or why)
                time.sleep(0.05)
            yield here
        finally:
            stop(process)


def mortal(signal: str = "TERM") -> list[str]:
    """A command prefix that makes the command die with this process, even on SIGKILL."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", signal, "--"] if setpriv else []


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a process: SIGTERM, and SIGKILL after 5 seconds."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True


def last_line(said: str) -> str:
    """The last line of a program's output, printable."""
    lines: Sequence[str] = [line.strip() for line in said.splitlines() if line.strip()]
    return ascii(lines[-1][:200])[1:-1] if lines else "it printed nothing"
